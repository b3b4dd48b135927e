"use strict";
// Text goes into the page as text alone, never as markup.
const get = (id) => document.getElementById(id);
let item = null;
let busy = false;

const percent = (p) => (p === null ? "no number" : `${(100 * p).toFixed(1)}%`);

function said(answer, prob, positive) {
  if (answer === null && prob === null) return "not asked";
  if (positive === null) return answer || "no answer of its own is known";
  const chance = `P(${positive}) ${percent(prob)}`;
  return answer === null || answer === "" ? chance : `${answer}, ${chance}`;
}

// Of labels that are to prove something.
function showCertificate(state) {
  const p = state.progress;
  document.title = get("title").textContent = state.title;
  get("count").textContent = p.said;
  get("bar").max = 1;
  get("bar").value = p.share;
  get("bar").setAttribute("aria-label", "how much is proven");
  get("goal").textContent = state.goal;
  get("goal").hidden = false;
  get("undo").disabled = !p.can_undo;
  get("undo-empty").hidden = true;
  if (state.done === null) return;
  get("done").textContent = state.done.title;
  get("rest").textContent = state.done.text;
  get("more").textContent = "go on";
  get("again").hidden = !state.done.more;
  get("end").hidden = !state.done.end;
}

function showQueue(state) {
  const p = state.progress;
  get("count").textContent =
    `${state.reviewer}: ${p.answered_here} answered, ${p.skipped_here} skipped · ${p.left} left` +
    (p.lent ? ` (${p.lent} with others)` : "") + ` · ${p.finished} of ${p.selected} finished`;
  get("bar").max = Math.max(p.selected, 1);
  get("bar").value = p.finished;
  const can = p.answered_here + p.skipped_here > 0;
  get("undo").disabled = get("undo-empty").disabled = !can;
  if (state.item === null) {
    get("rest").textContent = p.lent ? `${p.lent} are with other reviewers now.`
      : p.selected > p.finished ? `Not finished: ${p.selected - p.finished} of ${p.selected} selected events; you have answered or skipped them, or their images are gone.`
      : "Every selected event is finished.";
  }
}

function show(state) {
  item = state.item;
  (state.goal === undefined ? showQueue : showCertificate)(state);
  get("item").hidden = item === null;
  get("empty").hidden = item !== null;
  get("note").textContent = state.note;
  get("note").className = "";
  if (item === null) {
    get("photo").removeAttribute("src");
    return;
  }
  get("photo").src = `/image?event=${encodeURIComponent(item.event_id)}`;
  get("photo").hidden = false;
  get("broken").hidden = true;
  get("answers").replaceChildren(...item.classes.map((name, index) => {
    const button = document.createElement("button");
    button.type = "button";
    if (index < 9) {
      const key = document.createElement("kbd");
      key.textContent = String(index + 1);
      button.append(key, " ");
    }
    button.append(name);
    button.addEventListener("click", () => act("answer", name));
    return button;
  }));
  get("said").hidden = state.blind;
  if (!state.blind) {
    get("stage-a").textContent = said(item.answer_a, item.prob_a, item.positive);
    get("stage-b").textContent = item.action === "exit" ? "not asked" : said(item.answer_b, item.prob_b, item.positive);
    get("result").textContent = { exit: `Stage A answered ${item.label}`, defer: `Stage B answered ${item.label}`,
      abstain: "nobody answered" }[item.action];
  }
  get("facts").textContent = item.facts ?? `served ${new Date(1000 * item.served).toISOString().replace("T", " ").slice(0, 19)} UTC · event ${item.event_id}` +
    (item.second ? " · second opinion" : "");
}

const again = () => (get("goal").hidden ? "next" : "more");

async function act(what, label) {
  if (busy || (item === null && (what === "answer" || what === "skip"))) return;
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    const body = { event_id: item === null ? "" : item.event_id, label: label ?? "" };
    const reply = await fetch(`/${what}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
    const state = await reply.json().catch(() => ({ error: `the server said ${reply.status}` }));
    if (!reply.ok) throw new Error(reply.status === 503 ? state.error : `Nothing was saved: ${state.error}`);
    show(state);
  } catch (error) {
    const gone = error instanceof TypeError;
    get("note").textContent = gone ? `The server does not answer: is \`stage1 ${get("goal").hidden ? "review" : "certify"}\` still running?` : error.message;
    get("note").className = "wrong";
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const key = event.key.toLowerCase();
  const index = "123456789".indexOf(key);
  if (key.length === 1 && index >= 0 && item !== null && index < item.classes.length) act("answer", item.classes[index]);
  else if (key === "s" && item !== null) act("skip");
  else if (key === "u") act("undo");
  else if (key === "r" && item === null && !get("again").hidden) act(again());
  else if (key === "e" && item === null && !get("end").hidden) act("end");
  else return;
  event.preventDefault();
});
get("skip").addEventListener("click", () => act("skip"));
for (const id of ["undo", "undo-empty"]) get(id).addEventListener("click", () => act("undo"));
get("again").addEventListener("click", () => act(again()));
get("end").addEventListener("click", () => act("end"));
get("photo").addEventListener("error", () => {
  if (item === null) return;
  get("photo").hidden = true;
  get("broken").hidden = false;
});
act("next");
