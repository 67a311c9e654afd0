/** What one answer cost, drawn: the way to the first token beside full prefill's predicted time, and the prompt's tokens. */

import { bar, byId, counted, el, formatCount, formatMs } from "./dom.js";

const PHASES = [
  ["queue", "Waiting", "for room among other requests"],
  ["retrieve", "Retrieve", "embed the question, find passages, build the prompt"],
  ["load", "Load KV", "read the passages' caches from memory or disk"],
  ["reposition", "Reposition", "rotate the keys to where they now stand"],
  ["probe", "Probe", "let the question look at every reused token"],
  ["select", "Select", "choose the tokens that it looked at most"],
  ["recompute", "Recompute", "run those tokens, the question and what had no KV"],
  ["sample", "Sample", "draw the first token"],
];

/** receipt: `usage.fusionrag`; promptTokens: all of the prompt; paintedMs: from asking to the first token on the screen. */
export function showReceipt(receipt, promptTokens, paintedMs) {
  byId("speed").replaceChildren(...speed(receipt, paintedMs));
  byId("times").replaceChildren(...times(receipt));
  byId("phases").replaceChildren(...phases(receipt).map(phaseEntry));
  byId("tokens").replaceChildren(...tokens(receipt, promptTokens));
  byId("receipt").hidden = false;
}

/** Why not every passage's KV was used, in words; nothing where it was. */
function way({ way: taken, predicted_ms: predicted }) {
  if (taken === "prefix") return " Only the first passage's KV was taken: that was predicted to be faster than waiting for the others'.";
  if (taken === "full" && predicted !== null) return " It was prefilled in full: that was predicted to be faster than bringing stored KV.";
  return taken === "full" ? " It was prefilled in full, as asked." : "";
}

function speed(receipt, paintedMs) {
  const { ttft_ms: ttft, predicted_full_ms: full } = receipt;
  const taken = way(receipt);
  const after = `First token after ${formatMs(ttft)}` + (paintedMs ? `, on the screen after ${formatMs(paintedMs)}.` : ".");
  if (!full) return [`${after} Full prefill's time cannot be predicted yet.`, taken];
  const factor = full / ttft;
  const words =
    factor >= 1.05 ? `${factor.toFixed(1)}× sooner` : factor <= 0.95 ? `${(1 / factor).toFixed(1)}× later` : "As soon";
  return [el("strong", {}, words), ` ${words === "As soon" ? "as" : "than"} full prefill. ${after}`, taken];
}

/** The phases that took time, and what is left between them. */
function phases({ ttft_ms: ttft, phases_ms: measured }) {
  const found = PHASES.map(([name, title, meaning]) => ({ name, title, meaning, value: measured[name] ?? 0 }));
  const rest = ttft - found.reduce((sum, phase) => sum + phase.value, 0);
  if (rest > 0.005 * ttft) found.push({ name: "rest", title: "Other", meaning: "handing over between these", value: rest });
  return found;
}

function times(receipt) {
  const { ttft_ms: ttft, predicted_full_ms: full } = receipt;
  const total = Math.max(ttft, full ?? 0, 1e-9);
  const parts = phases(receipt).map((p) => ({ name: p.name, value: p.value, title: `${p.title}: ${formatMs(p.value)}` }));
  const label = (words, ms) => el("p", { class: "row spread" }, el("span", {}, words), el("span", { class: "number" }, formatMs(ms)));
  const nodes = [label("This answer", ttft), bar(parts, total, `This answer: ${formatMs(ttft)}`)];
  if (full) {
    const predicted = [{ name: "full", value: full, title: `Full prefill: ${formatMs(full)}` }];
    nodes.push(label("Full prefill, predicted", full), bar(predicted, total, `Full prefill, predicted: ${formatMs(full)}`));
  }
  return nodes;
}

function phaseEntry({ name, title, meaning, value }) {
  const term = el("dt", { title: meaning }, el("span", { class: `swatch ${name}` }), title);
  return el("div", { class: value > 0 ? null : "none" }, term, el("dd", { class: "number" }, formatMs(value)));
}

function tokens(receipt, promptTokens) {
  const parts = [
    { name: "reused", value: receipt.reused_tokens, words: "reused" },
    { name: "recomputed", value: receipt.recomputed_tokens, words: "recomputed" },
    { name: "computed", value: receipt.computed_tokens, words: "computed" },
  ].map((p) => ({ ...p, title: `${formatCount(p.value)} ${p.words}` }));
  const legend = parts.map((p) =>
    el("li", {}, el("span", { class: `swatch ${p.name}` }), el("span", { class: "number" }, formatCount(p.value)), ` ${p.words}`),
  );
  const label = `${counted(promptTokens, "prompt token")}: ${parts.map((p) => p.title).join(", ")}`;
  return [bar(parts, Math.max(promptTokens, 1), label), el("ul", { class: "legend" }, ...legend)];
}
