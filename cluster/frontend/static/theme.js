// Runs before the page is shown, so that it does not flash in the other colours.
"use strict";
try {
  const theme = localStorage.getItem("cantata:theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // The browser keeps nothing for this page; the system's colours are used.
}
