// Episodes: the conversation as bubbles, and a bar for each turn above it. Texts are written with textContent, too.
const gapText = (gap) => (typeof gap === "number" ? `reverse KL ${number(gap, "number")} nats` : "");
const inWords = (numbers) => `${numbers.length > 1 ? "turns" : "turn"} ${numbers.join(", ").replace(/, (\d+)$/, numbers.length > 2 ? ", and $1" : " and $1")}`;
// The gap of a turn that gets the highest bar, the same in all episodes of the page.
const gapScale = (rows) => {
  const gaps = rows.flatMap((row) => (row.episode?.turns ?? []).map((turn) => turn.gap ?? 0)).filter((gap) => gap > 0).sort((a, b) => a - b);
  return gaps.length ? gaps[Math.min(gaps.length - 1, Math.floor(0.95 * gaps.length))] : 1;
};
// The gap of the turn that is farthest from the teacher; nothing where none is.
const farthest = (row) => row.episode?.turns[row.episode.worst]?.gap;
const tags = (episode, index) => {
  const turn = episode.turns[index];
  return [
    index === episode.worst && ["worst", "farthest from the teacher"],
    turn.errors && ["bad", turn.errors > 1 ? `${turn.errors} invalid calls` : "invalid call"],
    turn.success && ["good", "success"],
  ].filter(Boolean);
};

// One button for each turn, as high as the turn's mean gap; it leads to the turn.
const turnBars = (row, scale, go) => {
  const { turns, worst } = row.episode;
  const buttons = turns.map((turn, index) => {
    const marks = tags(row.episode, index);
    const bar = make("span", { class: "gap" });
    bar.style.height = `${Math.min(100, (100 * Math.max(0, turn.gap ?? 0)) / scale)}%`;
    const words = [`turn ${index + 1}`, gapText(turn.gap), ...marks.map(([, text]) => text)].filter(Boolean).join(", ");
    const sign = turn.errors ? "!" : turn.success ? "✓" : "";
    const made = make("button", { type: "button", class: marks.map(([name]) => name).join(" "), title: words, "aria-label": words, disabled: turn.from >= row.tokens.length }, make("span", { class: "sign", text: sign }), make("span", { class: "well" }, bar), make("span", { text: String(index + 1) }));
    made.addEventListener("click", () => go(index));
    return make("li", {}, made);
  });
  const bad = turns.flatMap((turn, index) => (turn.errors ? [index + 1] : []));
  const told = [
    worst !== undefined && `farthest from the teacher in turn ${worst + 1} (${gapText(turns[worst].gap)} a token)`,
    bad.length > 0 && `invalid calls in ${inWords(bad)}`,
  ].filter(Boolean).join("; ");
  const sentence = make("p", { class: "muted told", text: told ? `${told[0].toUpperCase()}${told.slice(1)}.` : "" });
  return make("div", { class: "bars" }, make("ol", { "aria-label": "Turns, by their mean reverse KL" }, ...buttons), sentence);
};

const bubble = (kind, head, ...body) => make("div", { class: `bubble ${kind}` }, make("div", { class: "head muted" }, ...head), ...body);
const heard = ([role, text], who, more = "") =>
  bubble(role === "tool" ? "heard tool" : role === "assistant" ? "wrote replayed" : "heard", [`${who}${role}${more}`], make("div", { class: "said", text }));

// `tokens` makes the box of a turn's tokens; `prompt`: whether the conversation begins with the prompt.
const conversation = (row, tokens, prompt) => {
  const { turns } = row.episode;
  const begun = prompt ? (row.turns ?? [["prompt", row.prompt]]) : [];
  const found = begun.map((message) => heard(message, "", message[0] === "assistant" ? ", in the prompt: not learnt from" : ""));
  turns.forEach((turn, index) => {
    if (turn.from >= row.tokens.length) return;
    const facts = [`turn ${index + 1}`, gapText(turn.gap), typeof turn.reward === "number" && turn.reward !== 0 && `reward ${minus(String(turn.reward))}`].filter(Boolean).join(" · ");
    const marks = tags(row.episode, index);
    const signs = marks.map(([name, text]) => make("span", { class: `tag ${name}`, text }));
    found.push(bubble(["wrote", ...marks.map(([name]) => name)].join(" "), [make("span", { text: facts }), ...signs], tokens(turn, index)));
    const over = index === turns.length - 1 ? ", not read: the episode was over" : "";
    (turn.said ?? []).forEach((message) => found.push(heard(message, "environment · ", over)));
  });
  return make("div", { class: "conversation" }, ...found);
};

// What models wrote before the teachers scored, closed at first.
const passages = (row) => {
  if (!row.passages) return "";
  const many = row.passages.length > 1;
  const summary = make("summary", { text: `${row.passages.length} text${many ? "s" : ""} that ${many ? "were" : "was"} written before scoring` });
  const found = row.passages.map(({ about, text }) => bubble("heard", [about], make("div", { class: "said", text: text || "∅" })));
  return make("details", { class: "passages" }, summary, make("div", { class: "conversation" }, ...found));
};
