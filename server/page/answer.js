/**
 * Asking, and the answer as it streams.
 *
 * Invariants: one question at a time; a token is painted as soon as it has arrived (sources and citations wait for the
 * first one to be on the screen); an answer that breaks off keeps the text it has.
 */

import { byId, counted, el, formatMs } from "./dom.js";
import { clearError, showError } from "./notices.js";
import { showReceipt } from "./receipt.js";
import { jumpTo, markCited, showReceipts, showSources, sourceElementId } from "./sources.js";

export class Conversation {
  #api;
  #modelName;
  #collectionId;
  #onMissing;
  #controller = null;
  #answer = null;

  /** modelName, collectionId: functions; onMissing: called when the collection turns out to be gone. */
  constructor(api, modelName, collectionId, onMissing) {
    this.#api = api;
    this.#modelName = modelName;
    this.#collectionId = collectionId;
    this.#onMissing = onMissing;
  }

  get isBusy() {
    return this.#controller !== null;
  }

  cancel() {
    this.#controller?.abort();
  }

  async ask(question, recomputeRatio) {
    if (this.isBusy || !question) return;
    this.#controller = new AbortController();
    this.#begin();
    try {
      const body = this.#body(question, recomputeRatio);
      for await (const event of this.#api.stream("v1/chat/completions", body, this.#controller.signal)) {
        this.#answer.take(event);
      }
      this.#answer.finish();
    } catch (error) {
      this.#fail(error, () => this.ask(question, recomputeRatio));
    } finally {
      this.#controller = null;
      this.#show(false);
    }
  }

  #body(question, recomputeRatio) {
    const body = {
      model: this.#modelName(),
      messages: [{ role: "user", content: question }],
      stream: true,
      stream_options: { include_usage: true },
      explain: true,
      citations: "inline",
    };
    if (this.#collectionId()) body.collection = this.#collectionId();
    if (recomputeRatio !== null) body.recompute_ratio = recomputeRatio;
    return body;
  }

  #begin() {
    clearError(byId("answer-error"));
    byId("receipt").hidden = true;
    byId("evidence").hidden = true;
    this.#show(true);
    this.#answer = new Answer();
  }

  #fail(error, retry) {
    if (error.name === "AbortError") {
      this.#answer.status("Cancelled.");
      return;
    }
    this.#answer.status("");
    showError(byId("answer-error"), error, retry);
    if (error.status === 404) this.#onMissing();
  }

  #show(isBusy) {
    const cancel = byId("cancel");
    const hadFocus = document.activeElement === cancel;
    byId("answer-text").setAttribute("aria-busy", isBusy);
    byId("send").setAttribute("aria-disabled", isBusy);
    cancel.hidden = !isBusy;
    if (!isBusy && hadFocus) byId("question").focus();
  }
}

class Answer {
  #text = byId("answer-text");
  #sources = [];
  #painted = null; // a promise, from the first token on
  #characters = []; // of the answer so far, markers included
  #markers = new Map(); // character behind a sentence → {length, indices}: the markers that stand there
  #finishReason = "stop";
  #usage = null;

  constructor() {
    this.#text.replaceChildren();
    this.status("Looking for passages…");
    for (const name of ["asked", "first-token-received", "first-token-painted"]) performance.clearMarks(name);
    performance.mark("asked");
  }

  status(words) {
    byId("answer-status").textContent = words;
  }

  /** One event of the stream. */
  take(event) {
    const choice = event.choices[0];
    if (choice?.delta.content) this.#append(choice.delta.content);
    if (event.sources && this.#sources.length === 0) {
      this.#sources = event.sources;
      this.#afterPaint(() => showSources(event.sources));
    }
    for (const annotation of choice?.delta.annotations ?? []) this.#cite(annotation);
    this.#finishReason = choice?.finish_reason ?? this.#finishReason;
    this.#usage = event.usage ?? this.#usage;
  }

  finish() {
    if (this.#characters.length === 0) this.status("The model answered nothing.");
    else this.status(this.#finishReason === "length" ? "Stopped at the length limit." : "");
    if (this.#usage === null) return;
    const { prompt_tokens: promptTokens, completion_tokens: completionTokens, fusionrag: receipt } = this.#usage;
    this.#afterPaint(() => {
      const [painted] = performance.getEntriesByName("first-token-painted");
      const [asked] = performance.getEntriesByName("asked");
      showReceipt(receipt, promptTokens, painted && painted.startTime - asked.startTime);
      showReceipts(this.#sources, receipt.chunks);
      const total = performance.now() - asked.startTime;
      const words = `${counted(completionTokens, "token")} from ${counted(this.#sources.length, "passage")} in ${formatMs(total)}.`;
      byId("answer-status").append(" ", words);
    });
  }

  #append(content) {
    if (this.#painted === null) {
      performance.mark("first-token-received");
      this.status("Answering…");
    }
    this.#characters.push(...content);
    const last = this.#text.lastChild;
    if (last?.nodeType === Node.TEXT_NODE) last.appendData(content);
    else this.#text.append(content);
    this.#painted ??= nextPaint();
  }

  /**
   * Makes links of the markers behind a cited sentence. Brackets elsewhere are the model's own words. Indices count
   * characters as the server does, not UTF-16 units.
   */
  #cite({ url_citation: cited }) {
    if (!cited || this.#markers.has(cited.end_index)) return;
    const behind = this.#characters.slice(cited.end_index).join("");
    const marker = /^ (\[\d+\])+/.exec(behind)?.[0];
    if (!marker) return;
    const indices = marker.match(/\d+/g).map(Number);
    this.#markers.set(cited.end_index, { length: marker.length, indices });
    this.#afterPaint(() => indices.forEach(markCited));
    this.#draw();
  }

  #draw() {
    const nodes = [];
    let at = 0;
    for (const [end, { length, indices }] of this.#markers) {
      nodes.push(this.#characters.slice(at, end).join(""), ...indices.map(markerLink));
      at = end + length;
    }
    this.#text.replaceChildren(...nodes, this.#characters.slice(at).join(""));
  }

  #afterPaint(draw) {
    if (this.#painted === null) draw();
    else this.#painted.then(draw);
  }
}

function markerLink(index) {
  const jump = (event) => {
    event.preventDefault();
    jumpTo(index);
  };
  const properties = { class: "cite", href: `#${sourceElementId(index)}`, "aria-label": `Source ${index}`, onclick: jump };
  return el("a", properties, `${index}`);
}

/** Resolves behind the next frame; in a hidden tab, where there is none, soon. */
function nextPaint() {
  return new Promise((resolve) => {
    const timeout = setTimeout(resolve, 250);
    requestAnimationFrame(() => {
      // a task posted from the frame's callback runs once the frame has been handed to the screen
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = () => {
        performance.mark("first-token-painted");
        clearTimeout(timeout);
        resolve();
      };
      port2.postMessage(null);
    });
  });
}
