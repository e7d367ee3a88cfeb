"""The text on which the demo tokenizer is trained: English, JSON, code and other scripts, so that
chats become words, not bytes."""

# Often enough that every word of the format is one token, at the beginning of a text as well as
# after a blank.
_FORMAT_WORDS = (
    "assistant\nanalysis\ncommentary\nfinal\nuser\nsystem\ndeveloper\nfunctions\njson\n to=functions.x\n "
    "to=assistant\n" * 12
)

CORPUS: tuple[str, ...] = (
    _FORMAT_WORDS,
    """You are a helpful assistant, a large language model. Answer the question of the user in a short and friendly way.
Knowledge cutoff: 2024-06
Current date: 2025-01-31

Reasoning: low
Reasoning: medium
Reasoning: high

# Valid channels: analysis, commentary, final. Channel must be included for every message.
Calls to these tools must go to the commentary channel: 'functions'.

# Instructions

# Tools

## functions

namespace functions {

// Gets the weather for a city.
type get_weather = (_: {
// The name of the city
location: string,
unit?: "celsius" | "fahrenheit", // default: celsius
days?: number,
details?: boolean,
tags?: string[],
}) => any;

// Searches the documents and returns the best results.
type search_documents = (_: {
query: string,
limit?: number, // default: 10
}) => any;

// Returns the current time.
type get_time = () => any;

} // namespace functions

system developer user assistant tool
analysis commentary final json code to=functions.get_weather to=functions.search to=assistant
""",
    """The assistant thinks before it answers. First it reads what the user wants, then it looks for the information that it needs,
and in the end it writes the answer. When a tool can help, it calls the tool and waits for the result. The user sees only the
final answer, so the answer should be complete and clear.

A server takes requests from many clients at the same time. Each request is a list of messages; the server turns it into tokens,
puts it into a queue, and the engine computes one token after another. While some sequences are still reading their prompt, others
are already writing. The cache keeps what was computed before, so that a second request with the same beginning is faster than
the first one. If there is no memory left, the newest sequence gives its blocks back and starts again later.

Once upon a time there was a small town between the mountains and the sea. In the morning the fishermen went out with their boats,
and in the evening they came back and told stories about the weather, the waves and the big fish which they had almost caught.
There was also an old woman who could play the violin. People said that whoever listened to her music would find the thing that
they had lost. One day a young man came to the town. He had walked for three weeks and he was very tired. "What have you lost?"
asked the old woman. "I don't know," he said, "but I think I'll know it when I hear it." She laughed, took her violin and played.

How are you today? I'm fine, thank you. What is the capital of France? The capital of France is Paris. What is two plus two? Two
plus two is four. Could you please explain how a computer works? A computer works with numbers: it reads them from memory, adds or
compares them, and writes the result back. Everything else, text, pictures, music and video, is made of such numbers. Why is the
sky blue? Because the air scatters blue light more strongly than red light. Can you write a poem about the rain? Of course:

Rain on the window, rain on the street,
rain on the leaves and rain on my feet.
It sings through the night and it sings through the day,
it washes the dust and the summer away.

Hello world! Hello there! Thanks for your help. Yes, that's right. No, that isn't right. I don't think so. Let me think about this.
We need to find the answer. The user asks about the weather. We should call the function. It's simple. Let's do it. They're here.
We've seen that before. You'll see. He'd like to know. She can't come. I won't do that. Here is the list that you asked for:

1. One thing that is important is to keep it simple.
2. Another thing is to test everything, also the error cases.
3. The last thing is to write down what was done and why.

- first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth
- Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
- January, February, March, April, May, June, July, August, September, October, November, December
- zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, twenty, thirty, hundred, thousand, million
- red, green, blue, yellow, black, white, orange, brown, grey
- cat, dog, bird, horse, fish, mouse, tree, flower, river, mountain, house, street, city, country, world, planet, star, sun, moon
""",
    """{"name": "get_weather", "arguments": {"location": "San Francisco", "unit": "celsius", "days": 3}}
{"id": "call_1", "type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
{"type": "object", "properties": {"query": {"type": "string", "description": "what to look for"}}, "required": ["query"]}
{"temperature": 21.5, "sunny": true, "wind": null, "forecast": [{"day": "Monday", "high": 24, "low": 12}, {"day": "Tuesday"}]}
{"items":[{"id":1,"title":"First item","price":9.99,"tags":["new","sale"]},{"id":2,"title":"Second item","price":19.5,"tags":[]}]}
{"error":{"message":"not found","type":"invalid_request_error","param":null,"code":404}}
{"status":"ok","count":128,"next":null,"results":[true,false,true],"user":{"name":"Ada","email":"ada@example.com","age":36}}
[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! How can I help you today?"}]
""",
    '''def fibonacci(n: int) -> int:
    """Return the n-th number of Fibonacci."""
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


class Counter:
    def __init__(self, start: int = 0) -> None:
        self.value = start

    def increment(self) -> int:
        self.value += 1
        return self.value


import json
from pathlib import Path

with open("data.json") as file:
    data = json.load(file)
for key, value in data.items():
    if value is not None and value != "":
        print(f"{key}: {value}")
    else:
        raise ValueError("empty value")

function add(left, right) {
  const result = left + right;
  return result;
}

for (let i = 0; i < 10; i++) {
  console.log("number " + i);
}

int main(void) {
    printf("Hello, world!\\n");
    return 0;
}

SELECT name, price FROM products WHERE price > 10 ORDER BY name;

<html><head><title>Page</title></head><body><p class="text">Hello <a href="https://example.com/">link</a></p></body></html>

| name | value |
| --- | --- |
| one | 1 |
| two | 2 |

```python
print("hello")
```

$ ls -la /home/user && cd .. # comment
https://example.com/path/to/page?query=value&other=1
''',
    """Guten Tag, wie geht es dir? Das Wetter ist heute sehr schön, und wir gehen später in die Stadt. Können Sie mir bitte helfen?
Bonjour, comment ça va ? Je voudrais un café, s'il vous plaît. Où est la gare ? Merci beaucoup, à bientôt, ça sera très bien.
Hola, ¿cómo estás? Quisiera saber dónde está la estación. Muchas gracias, señor. Mañana será otro día.
Привет, как дела? Сегодня хорошая погода. Спасибо большое, до свидания.
你好，世界。今天天气很好。谢谢你。我想知道现在几点。
こんにちは、世界。今日はいい天気ですね。ありがとうございます。
안녕하세요 세계. 감사합니다.
مرحبا بالعالم. شكرا جزيلا.
Γειά σου Κόσμε. Ευχαριστώ πολύ.
😀 😂 👍 🎉 ❤️ 🚀 ✅ → ← “quoted” ‘single’ – — … • € £ ° é è ü ö ä ß ñ ç
""",
)
"""The documents of the corpus, written for this purpose. A change here changes the ids of every
demo checkpoint made afterwards."""
