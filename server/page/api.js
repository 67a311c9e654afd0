/**
 * Talking to the server that this page came from: JSON, uploads, streams, and errors in words.
 *
 * Knows nothing of elements. Invariant: every address is relative, so that nothing is sent to another host; the key is
 * kept in sessionStorage and nowhere else.
 */

const KEY = "fusionrag-key";

/** A request that failed. `status` 0: the server was not reached, or the connection broke. */
export class ApiError extends Error {
  constructor(status, message, { code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** What happened and what to do about it: `{title, detail, remedy}`. */
export function explain(error) {
  const detail = error.message;
  if (!(error instanceof ApiError)) return { title: "This page made a mistake", detail, remedy: "Reload it." };
  const [title, remedy] = wording(error);
  return { title, detail, remedy };
}

function wording({ status, code, retryAfter }) {
  switch (status) {
    case 0:
      return ["The server cannot be reached", "See whether it is running, then try again."];
    case 401:
      return ["The server wants an API key", "Try again with a valid key."];
    case 404:
      if (code === "model_not_found") return ["The model has changed", "Reload this page."];
      return ["That is not there any more", "Choose a collection from the list, or create one."];
    case 408:
      return ["The upload took too long", "Try again, or send a smaller file."];
    case 413:
      return ["That is too large", "Split the file and upload its parts."];
    case 429:
      return ["The server is busy", `Try again in ${retryAfter ?? 1} s.`];
    case 503:
      if (code === "draining") return ["The server is shutting down", `Try again in ${retryAfter ?? 5} s.`];
      return ["The server cannot answer", "Whoever runs it has to restart it."];
    case 504:
      return ["The answer took too long", "Ask for less, or try again later."];
    case 507:
      return ["The server's disk is full", "Whoever runs it has to make room."];
    default:
      if (status >= 500) return ["The server failed", "Try again; its log has the details."];
      return ["The server refused this", ""]; // its words say why
  }
}

export class Api {
  #askForKey;
  #asking = null;

  /** askForKey: `(reason) => Promise<string | null>`, called when the server answers 401. */
  constructor(askForKey) {
    this.#askForKey = askForKey;
  }

  get hasKey() {
    return sessionStorage.getItem(KEY) !== null;
  }

  /** Asks for a key, once at a time however many requests need it. Resolves to whether there is one now. */
  async changeKey(reason) {
    this.#asking ??= this.#askForKey(reason).finally(() => (this.#asking = null));
    const key = await this.#asking;
    if (key !== null) sessionStorage.setItem(KEY, key);
    return key !== null;
  }

  async get(path) {
    return (await this.#send("GET", path)).json();
  }

  async post(path, body) {
    return (await this.#send("POST", path, body)).json();
  }

  async delete(path) {
    return (await this.#send("DELETE", path)).json();
  }

  /** All items of a list that comes in pages. */
  async list(path, limit = 100) {
    const items = [];
    let after = "";
    for (;;) {
      const page = await this.get(`${path}?order=desc&limit=${limit}${after}`);
      items.push(...page.data);
      if (!page.has_more || page.data.length === 0) return items;
      after = `&after=${encodeURIComponent(page.data.at(-1).id)}`;
    }
  }

  /** The events of a streamed answer, parsed. Throws ApiError, also for an error inside the stream. */
  async *stream(path, body, signal) {
    const response = await this.#send("POST", path, body, signal);
    let isComplete = false;
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") isComplete = true;
        else {
          const event = JSON.parse(data);
          if (event.error) throw new ApiError(500, event.error.message, { code: event.error.code });
          yield event;
        }
      }
    } catch (error) {
      throw connectionError(error);
    }
    if (!isComplete) throw new ApiError(0, "The connection broke before the answer was complete.");
  }

  /** Uploads one file and resolves to its object; `onProgress(fraction)` as its bytes leave. */
  async upload(file, onProgress, signal) {
    for (;;) {
      const key = sessionStorage.getItem(KEY);
      try {
        return await this.#uploadOnce(file, key, onProgress, signal);
      } catch (error) {
        if (error.status !== 401 || !(await this.#hasBetterKey(key, error.message))) throw error;
      }
    }
  }

  // fetch does not tell how much of a body has been sent
  #uploadOnce(file, key, onProgress, signal) {
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      request.open("POST", "v1/files");
      if (key !== null) request.setRequestHeader("Authorization", `Bearer ${key}`);
      request.upload.onprogress = (event) => onProgress(event.total > 0 ? event.loaded / event.total : 0);
      request.onerror = () => reject(new ApiError(0, "The connection broke during the upload."));
      request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
      request.onload = () => {
        if (request.status < 300) resolve(JSON.parse(request.responseText));
        else reject(errorOf(request.status, request.responseText, request.getResponseHeader("Retry-After")));
      };
      signal.addEventListener("abort", () => request.abort());
      const form = new FormData();
      form.append("purpose", "assistants");
      form.append("file", file, file.name);
      request.send(form);
    });
  }

  async #send(method, path, body, signal) {
    for (;;) {
      const key = sessionStorage.getItem(KEY);
      const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
      if (body !== undefined) headers["Content-Type"] = "application/json";
      let response;
      try {
        response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
      } catch (error) {
        throw connectionError(error);
      }
      if (response.ok) return response;
      const error = errorOf(response.status, await response.text(), response.headers.get("Retry-After"));
      if (response.status !== 401 || !(await this.#hasBetterKey(key, error.message))) throw error;
    }
  }

  /** Whether there is another key than the one that was refused, given meanwhile or now. */
  async #hasBetterKey(refused, reason) {
    if (refused !== sessionStorage.getItem(KEY)) return true;
    return this.changeKey(refused === null ? reason : "The server does not accept this key.");
  }
}

function connectionError(error) {
  return error instanceof TypeError ? new ApiError(0, "The connection was refused or has broken.") : error;
}

function errorOf(status, text, retryAfter) {
  try {
    const { message, code } = JSON.parse(text).error;
    return new ApiError(status, message, { code, retryAfter });
  } catch {
    return new ApiError(status, `The server answered with status ${status}.`, { retryAfter });
  }
}

/** The data of each server-sent event, as soon as it is complete. Comments (they keep a connection open) have none. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      pending += value;
      const complete = pending.split("\n\n");
      pending = complete.pop();
      for (const event of complete) {
        const data = event.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length > 0) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
