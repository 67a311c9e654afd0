/** The passages beside an answer: where each is from, whether it was cited, and what of it was recomputed. */

import { byId, counted, el, formatCount } from "./dom.js";

const ORIGINS = {
  device: ["from the GPU", "its KV was in the accelerator's memory"],
  host: ["from memory", "its KV was in the server's memory"],
  disk: ["from disk", "its KV was read from disk"],
  computed: ["computed", "it had no KV yet, so it was computed for this answer"],
};
const KINDS = { raw: "KV computed on its own", fused: "KV computed behind related passages" };

export const sourceElementId = (index) => `source-${index}`;

/** Shows them best first; their numbers are their places in the prompt. */
export function showSources(sources) {
  const byScore = [...sources].sort((a, b) => (b.score ?? 0) - (a.score ?? 0));
  byId("sources").replaceChildren(...byScore.map(card));
  byId("evidence-note").textContent = sources.length > 0 ? "" : "No passage was found for this question.";
  byId("evidence").hidden = false;
}

function card(source) {
  const place = source.page === null ? source.source : `${source.source}, page ${source.page}`;
  const score = source.score === null ? null : el("span", { class: "number", title: "retrieval score" }, source.score.toFixed(2));
  return el(
    "li",
    { id: sourceElementId(source.index), class: "source", tabindex: "-1", "data-chunk": source.chunk_id },
    el("h3", {}, el("span", { class: "index" }, `${source.index}`), el("span", { class: "name" }, source.title || place || "Untitled")),
    el("p", { class: "row spread quiet" }, el("span", { class: "place" }, source.title ? place : ""), score),
    el("p", { class: "tags" }),
    el("p", { class: "text" }, source.text),
  );
}

export function markCited(index) {
  const node = document.getElementById(sourceElementId(index));
  if (node === null || node.classList.contains("cited")) return;
  node.classList.add("cited");
  node.querySelector(".tags").prepend(el("span", { class: "tag cited" }, "cited"));
}

/** Brings a passage into view and focuses it. */
export function jumpTo(index) {
  const node = document.getElementById(sourceElementId(index));
  node?.scrollIntoView({ block: "nearest" });
  node?.focus({ preventScroll: true });
}

/** Adds the receipt of each passage: where its KV came from and which parts of its text were recomputed. */
export function showReceipts(sources, chunks) {
  const receipts = new Map(chunks.map((chunk) => [chunk.chunk_id, chunk]));
  let isShaded = false;
  for (const source of sources) {
    const chunk = receipts.get(source.chunk_id);
    const node = document.getElementById(sourceElementId(source.index));
    if (chunk === undefined || node === null) continue;
    const [origin, meaning] = ORIGINS[chunk.source] ?? [chunk.source, ""];
    const isReused = chunk.source !== "computed";
    const title = isReused ? `${meaning}; ${KINDS[chunk.kind] ?? chunk.kind}` : meaning;
    const numTokens = counted(chunk.num_tokens, "token");
    node.querySelector(".tags").append(
      el("span", { class: "tag", title }, `KV ${origin}`),
      el("span", { class: "tag" }, isReused ? `${formatCount(chunk.num_recomputed)} of ${numTokens} recomputed` : numTokens),
    );
    const ranges = chunk.recomputed ?? [];
    isShaded ||= ranges.length > 0;
    node.querySelector(".text").replaceChildren(...shaded(source.text, ranges));
  }
  if (isShaded) {
    const sample = el("mark", {}, "Shaded");
    byId("evidence-note").replaceChildren(sample, " text was recomputed for this question; the rest was reused as stored.");
  }
}

/** The text with `ranges` [begin, end) marked. The server counts characters, JavaScript UTF-16 units. */
function shaded(text, ranges) {
  const characters = Array.from(text);
  const piece = (begin, end) => characters.slice(begin, end).join("");
  const nodes = [];
  let at = 0;
  for (const [begin, end] of ranges) {
    nodes.push(piece(at, begin), el("mark", {}, piece(begin, end)));
    at = end;
  }
  return [...nodes, piece(at)].filter((node) => node !== "");
}
