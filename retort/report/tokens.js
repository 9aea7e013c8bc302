
// Token by token. All text of a model is written with textContent: it is never markup.
const view = document.getElementById("tokens-view");
const record = JSON.parse(document.getElementById("rollout-data")?.textContent ?? "null");
const LEVELS = 5;
const MOST_AT_ONCE = 240; // tokens
const STRIP_FROM = 40; // tokens; in a shorter answer the shades say it all
const make = (tag, set = {}, ...children) => {
  const element = document.createElement(tag);
  Object.entries(set).forEach(([name, value]) => {
    if (value === false || value === null || value === undefined) return;
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value === true ? "" : value);
  });
  element.append(...children);
  return element;
};
const shown = (value, unit) => (typeof value === "number" ? `${minus(String(value))}${unit ? ` ${unit}` : ""}` : "–");
// `p` or `n` for the sign, 0 to 5 for the size, `none` where nothing is known.
const level = (value, column) => {
  if (typeof value !== "number") return "none";
  const steps = Math.min(LEVELS, Math.floor((LEVELS * Math.abs(value)) / column.scale + 0.5));
  return `${column.signed && value < 0 ? "n" : "p"}${steps}`;
};
// A row's own values of a column: a name such as `constructor` is also one that every object has.
const valuesOf = (row, name) => (Object.hasOwn(row.values, name) ? row.values[name] : undefined);
const sizesOf = (unit) => {
  const sizes = [];
  unit.forEach((index) => index !== null && (sizes[index] = (sizes[index] ?? 0) + 1));
  return sizes;
};
// The tokens of a row, each with the line break behind it. Those of a unit stand in one box, unless it is one token on
// each side; those in no unit are marked. Of several views the first is drawn.
const boxed = (row, spans, from = 0) => {
  const own = Object.values(row.units ?? {})[0];
  if (!own) return spans.flat();
  const sizes = sizesOf(own.unit);
  const found = [];
  let box = null;
  spans.forEach(([token, ...tail], offset) => {
    const place = offset + from;
    const index = own.unit[place];
    token.classList.toggle("outside", index === null);
    if (index === null || (sizes[index] === 1 && (own.read?.[index] ?? [""]).length === 1)) return found.push(token, ...tail);
    const last = offset === spans.length - 1 || own.unit[place + 1] !== index;
    if (!offset || own.unit[place - 1] !== index) found.push((box = make("span", { class: "unit", role: "presentation" })));
    box.append(token, ...(last ? [] : tail));
    if (last) found.push(...tail);
  });
  return found;
};
const mean = (values) => {
  const known = (values ?? []).filter((value) => typeof value === "number");
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : -Infinity;
};

const tokensView = ({ columns, training, held_out: heldOut, first, images = {} }) => {
  const runs = [...new Set(training.map((row) => row.run))];
  const state = { mode: training.length ? "training" : "held", column: first, order: "step", run: "", place: 0, block: 0, token: null };
  const column = () => columns.find((one) => one.name === state.column);
  const highest = gapScale([...training, ...heldOut.flatMap((problem) => problem.answers)]);

  // --- controls ---
  const option = (value, text, chosen) => make("option", { value, text, selected: value === chosen });
  const select = (label, key, options) => {
    const box = make("select", {}, ...options);
    box.addEventListener("change", () => {
      state[key] = box.value;
      if (key !== "column") state.place = 0;
      state.token = null;
      draw();
    });
    return make("label", {}, `${label} `, box);
  };
  const kinds = [...new Set(columns.map((one) => one.kind))].map((kind) =>
    make("optgroup", { label: kind }, ...columns.filter((one) => one.kind === kind).map((one) => option(one.name, one.label, first)))
  );
  const modes = [training.length && ["training", "training rollouts"], heldOut.length && ["held", "held-out problems, before and after"]].filter(Boolean);
  const slider = make("input", { type: "range", min: 0, value: 0, "aria-label": "Which rollout" });
  const where = make("span", { class: "where" });
  const move = (by) => {
    state.place = Math.max(0, Math.min(listed.length - 1, state.place + by * Math.max(1, page().length)));
    state.token = null;
    draw();
  };
  const button = (text, label, by) => {
    const made = make("button", { type: "button", text, "aria-label": label });
    made.addEventListener("click", () => move(by));
    return made;
  };
  slider.addEventListener("input", () => {
    state.place = Number(slider.value);
    state.token = null;
    draw();
  });
  const orders = [option("step", "as written", "step"), option("mean", "most of that shade first"), option("reward", "lowest reward first"), ...(training.some(farthest) ? [option("turn", "farthest turn first")] : [])];
  const order = select("Order", "order", orders);
  const runBox = runs.length > 1 ? select("Run", "run", [option("", "all"), ...runs.map((run) => option(run, run))]) : "";
  const scale = make("span", { class: "scale muted", "aria-hidden": "true" });
  const about = make("p", { class: "muted about" });
  const drawn = training.some((row) => row.units) ? make("p", { class: "muted about units" }, make("span", { class: "unit", text: "A box" }), " is a unit of several tokens on a side, which has one number on either; ", make("span", { class: "outside", text: "dots" }), " mark what is in no unit: the teacher says nothing about it.") : "";
  view.append(
    make("div", { class: "shade" }, ...(modes.length > 1 ? [select("Show", "mode", modes.map(([value, text]) => option(value, text)))] : []), ...(columns.length ? [select("Shade by", "column", kinds)] : []), scale),
    about,
    drawn,
    make("div", { class: "shade" }, button("‹", "Earlier ones", -1), slider, button("›", "Later ones", 1), where, runBox, order)
  );
  const blocks = make("div", { class: "blocks" });
  const details = make("aside", { class: "details", "aria-label": "Numbers of a token" });
  view.append(make("div", { class: "reading" }, blocks, details));

  // --- what is shown ---
  let listed = [];
  // Short rollouts are shown several at a time, long ones and episodes by themselves.
  const page = () => {
    if (state.mode === "held") return listed.slice(state.place, state.place + 1);
    let room = MOST_AT_ONCE;
    return listed.slice(state.place, state.place + 8).filter((row, index) => (room -= row.episode ? Infinity : row.tokens.length) >= 0 || index === 0);
  };
  const relist = () => {
    if (state.mode === "held") return (listed = heldOut);
    listed = training.filter((row) => !state.run || row.run === state.run);
    if (state.order === "mean") listed = [...listed].sort((a, b) => mean(valuesOf(b, state.column)) - mean(valuesOf(a, state.column)));
    if (state.order === "turn") listed = [...listed].sort((a, b) => (farthest(b) ?? 0) - (farthest(a) ?? 0));
    if (state.order === "reward") listed = [...listed].sort((a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity));
    return listed;
  };
  const facts = (row) => [row.run && runs.length > 1 && row.run, row.status, row.reward !== null && `reward ${row.reward}`, `${(row.tokens.length + (row.more ?? 0)).toLocaleString("en")} tokens`, row.episode && `${row.episode.turns.length} turn${row.episode.turns.length === 1 ? "" : "s"}`, row.source !== "student" && `from the ${row.source}`].filter(Boolean).join(" · ");

  const strip = (row, one) => {
    const values = valuesOf(row, one?.name);
    if (!values || values.length < STRIP_FROM) return "";
    const [width, height] = [1000, one.signed ? 60 : 40];
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const set = { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", class: "strip", role: "img", "aria-label": `${one.label} along the answer` };
    Object.entries(set).forEach(([name, value]) => svg.setAttribute(name, value));
    const zero = one.signed ? height / 2 : height - 1;
    const gap = width / values.length;
    const bars = { p: "", n: "" };
    values.forEach((value, index) => {
      if (typeof value !== "number") return;
      const size = Math.min(1, Math.abs(value) / one.scale) * (one.signed ? height / 2 - 1 : height - 2);
      const down = one.signed && value < 0;
      bars[down ? "n" : "p"] += `M${(gap * index).toFixed(2)} ${zero}v${(down ? size : -size).toFixed(1)}h${Math.max(gap * 0.86, 0.4).toFixed(2)}V${zero}z`;
    });
    for (const [sign, path] of Object.entries(bars)) {
      const drawn = document.createElementNS("http://www.w3.org/2000/svg", "path");
      drawn.setAttribute("d", path || "M0 0");
      drawn.setAttribute("class", `bar ${sign}`);
      svg.append(drawn);
    }
    return svg;
  };

  // The images of a prompt beside it; a tooltip and the text for those who do not see say which one it is.
  const pictures = (digests, whose, caption = "") =>
    (digests ?? []).map((digest, index) => {
      const words = `${whose} ${index + 1} of ${digests.length}`;
      const source = Object.hasOwn(images, digest) ? images[digest] : null;
      const seen = source ? make("img", { src: source, alt: words, title: words }) : make("span", { class: "muted", text: `[${words}: no thumbnail]` });
      return make("figure", {}, seen, ...(caption ? [make("figcaption", { class: "muted", text: caption })] : []));
    });
  const withImages = (row, box) => {
    const found = [...pictures(row.images, "image"), ...pictures(row.teacher_images, "image for the teacher alone", "teacher only")];
    return found.length ? make("div", { class: "seen" }, make("div", { class: "pictures" }, ...found), box) : box;
  };

  // A conversation with who says what; a bare prompt is text alone.
  const promptBox = (row) => {
    if (!row.turns) return withImages(row, make("div", { class: "prompt", text: row.prompt }));
    const turns = row.turns.map(([role, text]) => make("div", { class: "turn" }, make("span", { class: "role", text: role }), make("span", { text })));
    return withImages(row, make("div", { class: "prompt" }, ...turns));
  };

  const block = (row, title, index, prompt) => {
    const one = column();
    const spans = row.tokens.map((token, place) => {
      // A line break at the token's end stands outside it, or its shade would show at the start of the next line.
      const tail = token.endsWith("\n");
      const body = (tail ? token.slice(0, -1) : token).split("\n");
      const value = one ? valuesOf(row, one.name)?.[place] : null;
      const span = make("span", { class: `t ${one ? level(value, one) : "none"}`, role: "option", id: `t-${index}-${place}`, "aria-selected": "false" });
      body.forEach((part, line) => span.append(...(line ? [make("span", { class: "muted", text: "⏎" }), "\n"] : []), part));
      if (tail) span.append(make("span", { class: "muted", text: "⏎" }));
      if (!token) span.append("∅");
      return tail ? [span, "\n"] : [span];
    });
    const all = spans.map(([span]) => span);
    const box = (from = 0, to = all.length, turn = "") => listen(make("div", { class: "tokens", tabindex: 0, role: "listbox", "aria-label": `${title}, ${row.id}${turn}, token by token` }, ...boxed(row, spans.slice(from, to), from)), row, index, title, all);
    const more = row.more ? make("p", { class: "muted", text: `… ${row.more.toLocaleString("en")} more tokens` }) : "";
    const head = make("h3", {}, title, make("span", { class: "muted", text: ` ${facts(row)}` }));
    if (!row.episode) return make("div", { class: "block" }, head, prompt ? promptBox(row) : "", passages(row), strip(row, one), box(), more);
    const go = (turn) => {
      const { from, to } = row.episode.turns[turn];
      const sizes = all.slice(from, to).map((_, offset) => Math.abs(valuesOf(row, state.column)?.[from + offset] ?? 0));
      state.token = [row, index, from + sizes.indexOf(Math.max(...sizes)), title];
      look(...state.token);
      const token = all[state.token[2]];
      token.closest(".tokens").focus({ preventScroll: true });
      token.scrollIntoView({ block: "center" });
    };
    const said = conversation(row, (turn, place) => box(turn.from, turn.to, `, turn ${place + 1}`), prompt);
    const talk = prompt ? withImages(row, said) : said;
    return make("div", { class: "block" }, head, turnBars(row, highest, go), passages(row), talk, more);
  };

  // What the pointer and the keys do over a box of tokens; `all` are those of the row, some of which may be in others.
  const listen = (box, row, index, title, all) => {
    const place = (event) => all.indexOf(event.target.closest(".t"));
    box.addEventListener("pointerover", (event) => place(event) >= 0 && look(row, index, place(event), title));
    box.addEventListener("pointerleave", () => state.token && look(...state.token));
    box.addEventListener("click", (event) => {
      const at = place(event);
      state.token = at < 0 || (state.token && state.token[0] === row && state.token[2] === at) ? null : [row, index, at, title];
      look(row, index, at < 0 ? null : at, title);
    });
    box.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -1e9, End: 1e9 }[event.key];
      if (event.key === "Escape") state.token = null;
      if (!by) return;
      event.preventDefault();
      const from = state.token && state.token[0] === row ? state.token[2] : by > 0 ? -1 : all.length;
      state.token = [row, index, Math.max(0, Math.min(all.length - 1, from + by)), title];
      look(...state.token);
      const other = all[state.token[2]].closest(".tokens");
      if (other !== box) other.focus();
      other.setAttribute("aria-activedescendant", `t-${index}-${state.token[2]}`);
      const one = column();
      const value = one ? valuesOf(row, one.name)?.[state.token[2]] : null;
      say(`${JSON.stringify(row.tokens[state.token[2]])}${one ? `, ${one.label} ${shown(value, one.unit)}` : ""}`);
    });
    return box;
  };

  // The unit that a token is in: the teacher's tokens, and the log-prob of the whole unit on both sides.
  const unitNumbers = (row, at, view, own) => {
    const index = own.unit[at];
    const box = make("div", { class: "of-unit" });
    if (index === null) {
      box.append(make("p", { class: "muted", text: `In no unit: the ${view} says nothing about it.` }));
      return box;
    }
    const count = own.unit.filter((one) => one === index).length;
    const tokens = own.read?.[index];
    const words = (many) => `${many} token${many === 1 ? "" : "s"}`;
    box.append(make("p", { class: "muted", text: `Unit of ${words(count)}${tokens ? `; to the ${view} ${words(tokens.length)}:` : ""}` }));
    if (tokens) box.append(make("p", { class: "read" }, ...tokens.map((text) => make("span", { text: JSON.stringify(text).slice(1, -1) || "∅" }))));
    const [ours, theirs] = [own.student[index], own.teacher[index]];
    const ratio = typeof ours === "number" && typeof theirs === "number" ? Number((theirs - ours).toPrecision(4)) : null;
    const list = make("dl");
    for (const [label, value] of [["student’s log-prob of it", ours], [`${view}’s log-prob of it`, theirs], [`log-ratio, ${view} − student`, ratio]])
      list.append(make("div", {}, make("dt", { text: label }), make("dd", { text: shown(value, "nats") })));
    box.append(list);
    return box;
  };

  // The numbers of one token, beside the text.
  const look = (row, index, at, title) => {
    blocks.querySelectorAll(".t.on").forEach((token) => {
      token.classList.remove("on");
      token.setAttribute("aria-selected", "false");
    });
    details.replaceChildren();
    if (at === null || at === undefined || at < 0) {
      details.append(make("p", { class: "muted", text: "Point at a token." }));
      return;
    }
    const span = document.getElementById(`t-${index}-${at}`);
    span?.classList.add("on");
    span?.setAttribute("aria-selected", "true");
    const token = JSON.stringify(row.tokens[at]).slice(1, -1);
    details.append(make("p", { class: "token", text: token || "(empty)" }));
    const place = (row.episode?.turns ?? []).findIndex(({ from, to }) => from <= at && at < to);
    const turn = place < 0 ? "" : `, turn ${place + 1}`;
    const id = row.ids ? `, id ${row.ids[at]}` : "";
    details.append(make("p", { class: "muted", text: `token ${at + 1} of ${row.tokens.length + (row.more ?? 0)}${turn}${id}` }));
    details.append(...Object.entries(row.units ?? {}).map(([view, own]) => unitNumbers(row, at, view, own)));
    const list = make("dl");
    for (const one of columns) {
      const value = valuesOf(row, one.name)?.[at];
      if (typeof value !== "number") continue;
      const size = Math.min(1, Math.abs(value) / one.scale);
      const bar = make("meter", { min: 0, max: 1, value: size.toFixed(3), class: one.signed && value < 0 ? "n" : "p", "aria-hidden": "true" });
      list.append(make("div", { class: one.name === state.column ? "chosen" : false, title: one.about }, make("dt", { text: one.label }), make("dd", {}, bar, shown(value, one.unit))));
    }
    details.append(list);
  };

  const swatches = (letter, from, to) => Array.from({ length: Math.abs(to - from) + 1 }, (_, i) => make("i", { class: `${letter}${from + Math.sign(to - from) * i}` }));
  const draw = () => {
    relist();
    const one = column();
    const row = listed[state.place];
    const held = state.mode === "held";
    scale.replaceChildren();
    if (one) {
      const end = shown(Number(one.scale.toPrecision(3)), one.unit);
      scale.append(...(one.signed ? [`−${end.split(" ")[0]} `, ...swatches("n", LEVELS, 1)] : ["0 "]), ...swatches("p", 0, LEVELS), ` ${one.falling ? "−" : ""}${end} and beyond`);
    }
    about.textContent = one?.about ? `${one.label[0].toUpperCase()}${one.label.slice(1)}: ${one.about}.` : "";
    slider.max = Math.max(0, listed.length - 1);
    slider.value = state.place;
    slider.disabled = listed.length < 2;
    const rows = held ? (row ? row.answers.map((answer) => [answer, answer.who]) : []) : page().map((one) => [one, `Step ${one.step ?? "?"}`]);
    const last = state.place + rows.length;
    where.textContent = held ? `problem ${state.place + 1} of ${listed.length}` : `${state.place + 1}${rows.length > 1 ? `–${last}` : ""} of ${listed.length}`;
    slider.setAttribute("aria-valuetext", where.textContent);
    order.hidden = held;
    if (runBox) runBox.hidden = held;
    blocks.replaceChildren();
    if (!row) return;
    if (held) blocks.append(make("p", { class: "muted id", text: row.id }), promptBox(row));
    rows.forEach(([answer, title], index) => blocks.append(block(answer, title, index, !held)));
    // Something to read at once: the token that stands out most.
    const sizes = (valuesOf(rows[0][0], state.column) ?? []).map((value) => Math.abs(value ?? 0));
    if (sizes.length) look(rows[0][0], 0, sizes.indexOf(Math.max(...sizes)), rows[0][1]);
    else look(null, 0, null);
  };
  draw();
};
if (record) tokensView(record);
