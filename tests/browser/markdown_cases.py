"""Texts and the elements that they give on the page."""


def code(text: str, language: str) -> str:
    """Return a block of code as HTML."""
    return (
        f'<figure class="code"><figcaption><span class="language">{language}</span><button type="button" '
        'class="button  quiet small" aria-label="Copy code" title="Copy code"><svg class="icon" '
        'aria-hidden="true"><use href="#icon-copy"></use></svg><span>Copy</span></button></figcaption>'
        f'<pre tabindex="0" role="region" aria-label="Code, {language}"><code>{text}</code></pre></figure>'
    )


def link(address: str, text: str) -> str:
    """Return a link as HTML."""
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer nofollow">{text}</a>'


_NO_LINK = '<span title="This link\'s address is not shown as a link.">{}</span>'

CASES = {
    "one\ntwo  \nthree\n\nfour": "<p>one<br>two<br>three</p><p>four</p>",
    "# One\n## Two ##\ntext": '<h3 class="level-1" aria-level="3">One</h3><h3 class="level-2" aria-level="4">'
    "Two</h3><p>text</p>",
    "# a#\n## b # #\n### #\n# c\td \t##\t": '<h3 class="level-1" aria-level="3">a#</h3><h3 class="level-2" '
    'aria-level="4">b #</h3><h3 class="level-3" aria-level="5"></h3><h3 class="level-1" aria-level="3">'
    "c\td</h3>",
    "#none": "<p>#none</p>",
    "**a *b* c** __d__ _e_ ~~f~~ ***g***": "<p><strong>a <em>b</em> c</strong> <strong>d</strong> <em>e</em> "
    "<s>f</s> <strong><em>g</em></strong></p>",
    "2 * 3 * 4, snake_case_name, **open": "<p>2 * 3 * 4, snake_case_name, **open</p>",
    r"\*not\* \<b> <b>bold</b> &amp;": "<p>*not* &lt;b&gt; &lt;b&gt;bold&lt;/b&gt; &amp;amp;</p>",
    "`a` ``b ` c`` `*d*`": "<p><code>a</code> <code>b ` c</code> <code>*d*</code></p>",
    "`` `a` `` ` b` `  `": "<p><code>`a`</code> <code> b</code> <code>  </code></p>",
    "(https://example.com/a_(b)).)?": "<p>("
    + link("https://example.com/a_(b)", "https://example.com/a_(b)")
    + ").)?</p>",
    "[a *b*](https://example.com/c_(d) 'title')": "<p>"
    + link("https://example.com/c_(d)", "a <em>b</em>")
    + "</p>",
    "See https://example.com/a_b_c. And <http://example.com/>!": "<p>See "
    + link("https://example.com/a_b_c", "https://example.com/a_b_c")
    + ". And "
    + link("http://example.com/", "http://example.com/")
    + "!</p>",
    "![alt](https://example.com/x.png)": "<p>" + link("https://example.com/x.png", "alt") + "</p>",
    "[a](javascript:alert(1)) [b](/c) [d]": "<p>"
    + _NO_LINK.format("a")
    + " "
    + _NO_LINK.format("b")
    + " [d]</p>",
    "- a\n- b\n  - c\n    d\n- e": '<ul><li><span class="line">a</span></li><li><span class="line">b</span>'
    '<ul><li><span class="line">c<br>d</span></li></ul></li><li><span class="line">e</span></li></ul>',
    "3. a\n\n4. b\n\ntext": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol><p>text</p>',
    "- [ ] a\n- [x] b": '<ul><li class="task"><input type="checkbox" disabled="" aria-label="to do"><div>'
    '<span class="line">a</span></div></li><li class="task"><input type="checkbox" disabled="" checked="" '
    'aria-label="done"><div><span class="line">b</span></div></li></ul>',
    "1. a\n   ```py\n   b\n     c\n   ```\n2. d": '<ol start="1"><li><span class="line">a</span>'
    + code("b\n  c", "py")
    + '</li><li><span class="line">d</span></li></ol>',
    "> a\n> > b\nc\n\nd": "<blockquote><p>a</p><blockquote><p>b<br>c</p></blockquote></blockquote><p>d</p>",
    "| a | *b* |\n|:-|-:|\n| 1 \\| 2 | 3 |\n| 4 |\n\nx": '<div class="table" tabindex="0" role="region" '
    'aria-label="Table"><table><thead><tr><th class="start" scope="col">a</th><th class="end" scope="col">'
    '<em>b</em></th></tr></thead><tbody><tr><td class="start">1 | 2</td><td class="end">3</td></tr><tr>'
    '<td class="start">4</td><td class="end"></td></tr></tbody></table></div><p>x</p>',
    "```\na\n\n  <b>\n```\nb": code("a\n\n  &lt;b&gt;", "text") + "<p>b</p>",
    "~~~c++ title\na": code("a", "c++"),
    "a\n\n---\n\n***": "<p>a</p><hr><hr>",
    "a\n- b\n# c": '<p>a</p><ul><li><span class="line">b</span></li></ul><h3 class="level-1" aria-level="3">'
    "c</h3>",
}
"""HTML by text."""

_RUN = 200_000

LARGE = [
    "*a " * 10_000,
    "**a_b" * 10_000,
    "[" * 10_000,
    "[a](" * 8_000,
    "`a ``b" * 8_000,
    "> " * 8_000 + "a",
    "- " * 8_000 + "a",
    "\n".join(" " * depth + "- a" for depth in range(500)),
    "| a " * 8_000 + "\n" + "|-" * 8_000,
    "http://" * 8_000,
    "~~~~\n" + "a\n" * 20_000,
    # Runs of one character that a regular expression could divide in many ways.
    "# a" + " " * _RUN + "b",
    "# " + " " * _RUN + "\u2028" + "a" * 1001,
    "- " + " " * _RUN + "\u2028" + "a" * 1001,
    "~~~" + " " * _RUN + "`",
    "~" * _RUN + "`",
    "a | b\n" + " " * _RUN + "a-" + "a" * 1001,
    "a | b\n:-" + " " * _RUN + "a",
    "a" + " " * _RUN + "b\nc",
    "` " + "a" * _RUN + "`",
    "https://example.com/" + "." * _RUN + "a",
    "https://example.com/" + ")" * _RUN,
]
