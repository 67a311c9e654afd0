/** Errors as the reader sees them: what happened, the server's words, what to do, and a way to try again. */

import { explain } from "./api.js";
import { el } from "./dom.js";

/** Shows `error` in `place`, in the place of what was shown there before. retry: called by the button, if given. */
export function showError(place, error, retry = null) {
  const { title, detail, remedy } = explain(error);
  const button = retry && el("button", { type: "button", onclick: retry }, "Try again");
  place.replaceChildren(
    el("div", { class: "notice error", role: "alert" }, el("strong", {}, title), el("p", {}, detail), remedy && el("p", {}, remedy), button),
  );
}

export const clearError = (place) => place.replaceChildren();
