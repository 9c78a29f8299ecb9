// Conversations, settings and the API key, kept in this browser and nowhere else.

const CONVERSATIONS = "octavo.conversations";
const SETTINGS = "octavo.settings";
const KEY = "octavo.key";

function read(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // private mode, or something else's value
  }
}

function write(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false; // full, or switched off: the page works on without
  }
}

// A conversation: {id, title, messages: [{role, content, reasoning?, facts?}]}; newest first.
export class Store {
  constructor() {
    this.conversations = read(localStorage, CONVERSATIONS, []);
    if (!Array.isArray(this.conversations)) this.conversations = [];
    this.settings = read(localStorage, SETTINGS, {});
  }

  create() {
    const made = { id: crypto.randomUUID?.() ?? String(Date.now()) + Math.random(), title: "", messages: [] };
    this.conversations.unshift(made);
    return made;
  }

  remove(id) {
    this.conversations = this.conversations.filter((each) => each.id !== id);
    this.save();
  }

  // Whether it could be kept.
  save() {
    return write(localStorage, CONVERSATIONS, this.conversations.filter((each) => each.messages.length));
  }

  saveSettings() {
    write(localStorage, SETTINGS, this.settings);
  }

  get key() {
    return read(sessionStorage, KEY, "") || read(localStorage, KEY, "");
  }

  // For this tab, or for good.
  setKey(key, keep) {
    write(sessionStorage, KEY, key);
    if (keep) write(localStorage, KEY, key);
    else localStorage.removeItem(KEY);
  }
}

export function title(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 48 ? line.slice(0, 47) + "\u2026" : line;
}

export function markdown(conversation) {
  const parts = conversation.messages.map(
    (message) => `## ${message.role === "user" ? "You" : "Assistant"}\n\n${message.content}\n`,
  );
  return `# ${conversation.title}\n\n${parts.join("\n")}`;
}
