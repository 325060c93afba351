"use strict";
// What the page is made of: elements, and a few combinations of them.

const SVG_TAGS = new Set([
  "svg",
  "g",
  "path",
  "line",
  "rect",
  "circle",
  "text",
  "title",
  "clipPath",
]);

/** Return a new element; texts among the children stay texts, whatever they hold. */
function element(tag, attributes = {}, ...children) {
  const svg = SVG_TAGS.has(tag);
  const made = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style")
      for (const [key, to] of Object.entries(value)) made.style.setProperty(key, to);
    else if (value !== null && value !== false)
      made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

const heading = (id, text) => element("h2", { id }, text);
const text = (words, kind = null) => element("p", { class: kind }, words);

/** Return a table that scrolls inside its frame; cells are texts or elements. */
function table(head, rows, caption) {
  const cell = (content, i) => {
    const shown = content?.nodeType ? content : String(content ?? "");
    if (i === 0) return element("th", { scope: "row" }, shown);
    // Long texts get room, so that rows do not grow tall on a narrow screen.
    return element("td", { class: head && shown.length > 60 ? "text" : null }, shown);
  };
  const body = rows.map((row) => element("tr", {}, ...row.map(cell)));
  const titles = (head || []).map((name) => element("th", { scope: "col" }, name));
  return element(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    element(
      "table",
      { class: head ? null : "facts" },
      head ? element("thead", {}, element("tr", {}, ...titles)) : null,
      element("tbody", {}, ...body),
    ),
  );
}

/** Return buttons of which one is pressed, and call `choose` with its key. */
function choice(label, options, chosen, choose) {
  const buttons = Object.entries(options).map(([key, name]) =>
    element(
      "button",
      {
        type: "button",
        "aria-pressed": String(key === chosen),
        "data-key": key,
        onclick: () => {
          for (const each of buttons)
            each.setAttribute("aria-pressed", String(each.dataset.key === key));
          choose(key);
        },
      },
      name,
    ),
  );
  return element(
    "div",
    { class: "choice" },
    label,
    element("span", { class: "group", role: "group", "aria-label": label }, ...buttons),
  );
}

/** Return a button that shows or hides what it names; `toggle` does it and says what came of it. */
function legendEntry(name, { kind, color, run }, toggle) {
  const several = view.runs.length > 1 && color === run.color && kind !== "run";
  const button = element(
    "button",
    {
      type: "button",
      "aria-pressed": "true",
      title: "show or hide",
      onclick: () => button.setAttribute("aria-pressed", String(toggle())),
    },
    element("span", {
      class: `swatch ${{ faint: "faint", pale: "faint", points: "dot" }[kind] || ""}`,
      style: { color: several ? "var(--soft)" : color },
    }),
    name,
  );
  return button;
}
