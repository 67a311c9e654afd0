/** Building and finding elements, and wording numbers. Text only ever becomes a text node; nothing here parses markup. */

export const byId = (id) => document.getElementById(id);

/** A new element. A property is an attribute, or an `on…` listener; those that are null, undefined or false are left out. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

/** A bar of coloured parts `{name, value, title}`, whose full width stands for `total`. */
export function bar(parts, total, label) {
  const node = el("div", { class: "bar", role: "img", "aria-label": label });
  for (const { name, value, title } of parts) {
    if (!(value > 0)) continue;
    const part = el("span", { class: `part ${name}`, title });
    part.style.width = `${(100 * value) / total}%`; // a style attribute would be refused by the page's policy
    node.append(part);
  }
  return node;
}

export function formatMs(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)}\u00a0s`;
  return `${ms.toFixed(ms < 10 ? 1 : 0)}\u00a0ms`;
}

export function formatBytes(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  const power = Math.min(Math.floor(Math.log10(Math.max(bytes, 1)) / 3), units.length - 1);
  const value = bytes / 1000 ** power;
  return `${power === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)}\u00a0${units[power]}`;
}

export const formatCount = (count) => count.toLocaleString("en");

export const counted = (count, one, many = `${one}s`) => `${formatCount(count)} ${count === 1 ? one : many}`;
