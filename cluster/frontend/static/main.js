/** The page: its tabs, its panels, its keys and the colours. */

import { Api, ApiError, Key } from "./api.js";
import { ChatTab } from "./chat_tab.js";
import { ClusterTab } from "./cluster_tab.js";
import { byId } from "./dom.js";
import { browserStorage, Store } from "./store.js";

const THEMES = /** @type {const} */ (["auto", "light", "dark"]);
const RETRY_MS = 3000;
const CLUSTER_HASH = "#tab=cluster";

const key = new Key();
const api = new Api(key);
const storage = browserStorage();
const keyDialog = /** @type {HTMLDialogElement} */ (byId("key-dialog"));
const shortcuts = /** @type {HTMLDialogElement} */ (byId("shortcuts"));
const chat = new ChatTab(api, new Store(storage, new URL(".", document.baseURI).pathname), {
  openKey,
  openSettings: () => setPanel("settings", true),
});
const cluster = new ClusterTab(api, { openKey });

/** Ask for an API key. */
function openKey() {
  if (keyDialog.open) return;
  /** @type {HTMLInputElement} */ (byId("key")).value = key.value;
  /** @type {HTMLInputElement} */ (byId("keep-key")).checked = key.isKept;
  keyDialog.showModal();
}

byId("key-form").addEventListener("submit", () => {
  const value = /** @type {HTMLInputElement} */ (byId("key")).value.trim();
  key.set(value, /** @type {HTMLInputElement} */ (byId("keep-key")).checked);
  void loadModel();
});
byId("open-key").addEventListener("click", openKey);
byId("open-shortcuts").addEventListener("click", () => shortcuts.showModal());
for (const dialog of [keyDialog, shortcuts]) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.querySelector("[data-close]")?.addEventListener("click", () => dialog.close());
}

/** Show which model is served, also when the server comes back. */
async function loadModel() {
  const name = byId("model");
  try {
    const model = (await api.json("v1/models")).data[0];
    chat.setModel(model);
    name.textContent = model.id;
    byId("served").textContent = model.id;
    byId("context").textContent = Number(model.max_model_len).toLocaleString("en");
    byId("serving").hidden = false;
    byId("toy").hidden = model.id !== "demo" && model.root !== "demo";
    name.dataset.state = "ready";
  } catch (error) {
    const needsKey = error instanceof ApiError && error.status === 401;
    name.textContent = needsKey ? "needs a key" : "server not reached";
    name.dataset.state = "failed";
    if (needsKey) openKey();
    else setTimeout(() => void loadModel(), RETRY_MS);
  }
}

// Tabs

const tabs = [byId("tab-chat"), byId("tab-cluster")];

/** @param {HTMLElement} tab @param {boolean} [focus] */
function openTab(tab, focus = false) {
  for (const each of tabs) {
    const open = each === tab;
    each.setAttribute("aria-selected", String(open));
    each.tabIndex = open ? 0 : -1;
    byId(/** @type {string} */ (each.getAttribute("aria-controls"))).hidden = !open;
  }
  document.body.dataset.tab = tab.id;
  if (focus) tab.focus();
  cluster.show(tab.id === "tab-cluster");
  history.replaceState(null, "", tab.id === "tab-cluster" ? CLUSTER_HASH : location.pathname + location.search);
}

for (const tab of tabs) {
  tab.addEventListener("click", () => openTab(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") openTab(tabs[1 - tabs.indexOf(tab)], true);
  });
}

// Panels: beside the chat on a wide screen, over it on a narrow one

const narrow = matchMedia("(max-width: 60rem)");

/** @param {"sidebar" | "settings"} name */
function isOpen(name) {
  return !byId(name).hidden;
}

/** @param {"sidebar" | "settings"} name @param {boolean} open */
function setPanel(name, open) {
  const panel = byId(name);
  if (isOpen(name) === open) return;
  if (open && narrow.matches) setPanel(name === "sidebar" ? "settings" : "sidebar", false);
  panel.hidden = !open;
  const button = byId(`toggle-${name}`);
  button.setAttribute("aria-expanded", String(open));
  arrangePanels();
  if (open) /** @type {HTMLElement | null} */ (panel.querySelector("[data-first]"))?.focus();
  else if (panel.contains(document.activeElement) || document.activeElement === document.body) button.focus();
}

/** On a narrow screen an open panel covers the chat, which then takes no focus. */
function arrangePanels() {
  const covered = narrow.matches && (isOpen("sidebar") || isOpen("settings"));
  byId("cover").hidden = !covered;
  byId("conversation").inert = covered;
}

for (const name of /** @type {const} */ (["sidebar", "settings"])) {
  byId(`toggle-${name}`).addEventListener("click", () => setPanel(name, !isOpen(name)));
  byId(`close-${name}`).addEventListener("click", () => setPanel(name, false));
}
byId("cover").addEventListener("click", closePanels);
byId("sidebar").addEventListener("click", (event) => {
  const isChoice = event.target instanceof Element && event.target.closest(".conversation, #new-chat");
  if (narrow.matches && isChoice) closePanels();
});
narrow.addEventListener("change", () => {
  setPanel("settings", false);
  setPanel("sidebar", !narrow.matches);
  arrangePanels();
});

function closePanels() {
  setPanel("sidebar", false);
  setPanel("settings", false);
}

// Colours

const themeButton = byId("theme");

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  const label = { auto: "Colours: as the system", light: "Colours: light", dark: "Colours: dark" }[theme] ?? "Colours";
  themeButton.setAttribute("aria-label", label);
  themeButton.title = label;
  themeButton.querySelector("use")?.setAttribute("href", `#icon-${theme}`);
}

themeButton.addEventListener("click", () => {
  const current = THEMES.indexOf(/** @type {any} */ (document.documentElement.dataset.theme ?? "auto"));
  const theme = THEMES[(current + 1) % THEMES.length];
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    storage?.setItem("cantata:theme", theme);
  } catch {
    // Full: the choice lasts until the page is closed.
  }
  showTheme();
});

// Keys

/** @type {Record<string, () => void>} */
const ALT_KEYS = {
  KeyN: () => {
    openTab(tabs[0]);
    chat.startNew();
  },
  KeyS: () => setPanel("settings", !isOpen("settings")),
  KeyB: () => setPanel("sidebar", !isOpen("sidebar")),
  Digit1: () => openTab(tabs[0], true),
  Digit2: () => openTab(tabs[1], true),
};

document.addEventListener("keydown", (event) => {
  if (keyDialog.open || shortcuts.open || event.defaultPrevented) return;
  const writes = event.target instanceof Element && event.target.closest("input, textarea, select");
  if (event.key === "Escape") {
    if (narrow.matches && !byId("cover").hidden) closePanels();
    else chat.stop();
  } else if (event.altKey && !event.ctrlKey && !event.metaKey && ALT_KEYS[event.code]) {
    event.preventDefault();
    ALT_KEYS[event.code]();
  } else if (!writes && !event.altKey && !event.ctrlKey && !event.metaKey && (event.key === "/" || event.key === "?")) {
    event.preventDefault();
    if (event.key === "?") shortcuts.showModal();
    else chat.focus();
  }
});

if (narrow.matches) setPanel("sidebar", false);
openTab(location.hash === CLUSTER_HASH ? tabs[1] : tabs[0]);
showTheme();
void loadModel();
if (!narrow.matches) chat.focus();
