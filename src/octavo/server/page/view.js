// Messages as elements. An answer's Markdown becomes HTML that can do nothing: no scripts, styles, forms, images.

import { marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em",
    "strong", "del", "a", "table", "thead", "tbody", "tr", "th", "td", "sup", "sub",
  ],
  ALLOWED_ATTR: ["href", "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
};

marked.use({ gfm: true, breaks: true });

export function setMarkdown(element, text) {
  element.replaceChildren(DOMPurify.sanitize(marked.parse(text), { ...ALLOWED, RETURN_DOM_FRAGMENT: true }));
  for (const link of element.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
}

// A message's element; `update` shows what it holds now.
export class MessageView {
  constructor(message) {
    this.message = message;
    this.element = make("article", { className: `message ${message.role}` });
    this.element.append(make("div", { className: "who", textContent: message.role === "user" ? "You" : "Assistant" }));
    this.reasoning = make("details");
    this.reasoning.append(make("summary", { textContent: "Reasoning" }), (this.reasoningText = make("div")));
    this.body = make("div", { className: "body" });
    this.under = make("div", { className: "under" });
    this.facts = make("span", { className: "facts" });
    this.under.append(this.facts);
    this.element.append(this.reasoning, this.body, this.under);
    this.update();
  }

  update(writing = false) {
    const { role, content, reasoning = "", facts = "" } = this.message;
    this.element.classList.toggle("writing", writing);
    if (role === "user") this.body.textContent = content;
    else setMarkdown(this.body, content);
    this.reasoning.hidden = !reasoning;
    this.reasoningText.textContent = reasoning;
    if (writing && reasoning && !content) this.reasoning.open = true;
    this.facts.textContent = facts;
  }

  // Shows a button below the message.
  offer(label, act) {
    const button = make("button", { type: "button", className: "quiet", textContent: label });
    button.addEventListener("click", act);
    this.under.append(button);
  }
}

export function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}
