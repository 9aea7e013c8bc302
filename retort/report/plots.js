"use strict";

// Numbers as axes.py writes them.
const minus = (text) => (/[1-9]/.test(text) ? text.replaceAll("-", "−") : text.replaceAll("-", ""));
const number = (value, kind) => {
  if (value === null || value === undefined) return "–";
  if (kind === "share") return minus(`${(100 * value).toFixed(1)}\u202f%`);
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e5 || size < 1e-3) {
    const [mantissa, power] = value.toExponential(1).split("e");
    return minus(`${mantissa.replace(/\.0$/, "")}e${Number(power)}`);
  }
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : 3;
  const [whole, part] = value.toFixed(digits).split(".");
  return minus(whole.replace(/\B(?=(\d{3})+$)/g, ",") + (part ? `.${part}` : ""));
};
const nearest = (values, wanted) =>
  values.reduce((best, value, index) => (Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? index : best), 0);

// A pointer over one plot, or an arrow key on it, reads that place off every plot with the same x axis.
const plots = [...document.querySelectorAll("svg[data-plot]")].map((svg) => {
  const data = JSON.parse(svg.dataset.plot);
  const cursor = svg.querySelector(".cursor");
  const axis = svg.querySelector(".axis");
  const outputs = [...svg.closest("figure").querySelectorAll(".legend b")]; // one for each curve
  const resting = [...outputs, axis].map((output) => output.textContent);
  const places = data.at.map(Number);
  return {
    svg,
    data,
    axis: svg.dataset.x,
    place: null,
    at(event) {
      const box = svg.getBoundingClientRect();
      return places[nearest(data.x, ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width)];
    },
    step(by) {
      const from = this.place ?? (by > 0 ? -1 : places.length);
      return places[Math.max(0, Math.min(places.length - 1, from + by))];
    },
    show(value) {
      const place = nearest(places, value);
      this.place = place;
      cursor.setAttribute("x1", data.x[place]);
      cursor.setAttribute("x2", data.x[place]);
      cursor.classList.add("on");
      data.series.forEach((one, index) => (outputs[index].textContent = number(one.y[place], data.kind)));
      axis.textContent = `${svg.dataset.x} ${data.at[place]}`;
    },
    rest() {
      this.place = null;
      cursor.classList.remove("on");
      [...outputs, axis].forEach((output, index) => (output.textContent = resting[index]));
    },
  };
});
for (const plot of plots) {
  const linked = plots.filter((other) => other.axis === plot.axis);
  plot.svg.addEventListener("pointermove", (event) => {
    const value = plot.at(event);
    linked.forEach((other) => other.show(value));
  });
  const rest = () => linked.forEach((other) => other.rest());
  plot.svg.addEventListener("pointerleave", rest);
  plot.svg.addEventListener("blur", rest);
  plot.svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (event.key === "Escape") rest();
    if (!by) return;
    event.preventDefault();
    const value = plot.step(by);
    linked.forEach((other) => other.show(value));
    const read = plot.data.series.map((one) => `${one.name} ${number(one.y[plot.place], plot.data.kind)}`);
    say(`${plot.axis} ${plot.data.at[plot.place]}: ${read.join(", ")}`);
  });
}

// One place where a screen reader hears what moved.
const voice = document.createElement("div");
voice.className = "unseen";
voice.setAttribute("aria-live", "polite");
document.body.append(voice);
const say = (text) => (voice.textContent = text);

// Saving a plot: as the numbers that are drawn, or as a picture that needs no style sheet.
const save = (name, type, text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};
// A formula must stay text: a name that a spreadsheet would run gets a quote before it.
const cell = (value) => {
  if (typeof value !== "string") return value ?? "";
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
const csv = ({ data, axis, svg }) => {
  const names = data.series.map((one) => one.name || svg.dataset.title);
  const head = [axis, ...data.series.flatMap((one, i) => (one.low ? [names[i], `${names[i]} low`, `${names[i]} high`] : [names[i]]))];
  const rows = data.at.map((at, place) => [
    Number.isNaN(Number(at)) ? at : Number(at),
    ...data.series.flatMap((one) => (one.low ? [one.y[place], one.low[place], one.high[place]] : [one.y[place]])),
  ]);
  return [head, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
};
const STYLES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity", "fill-opacity", "font-size", "font-family", "text-anchor", "visibility"];
const picture = ({ svg, data }) => {
  const copy = svg.cloneNode(true);
  const theirs = copy.querySelectorAll("*");
  svg.querySelectorAll("*").forEach((element, index) => {
    const style = getComputedStyle(element);
    STYLES.forEach((name) => theirs[index].setAttribute(name, style.getPropertyValue(name)));
  });
  const { width, height } = svg.viewBox.baseVal;
  const element = (kind, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
    return made;
  };
  const text = (words, x, y, fill, weight = "normal") => {
    const label = element("text", { x, y, fill, "font-size": "11", "font-weight": weight, "font-family": "sans-serif" });
    label.textContent = words;
    copy.append(label);
  };
  const styles = getComputedStyle(document.documentElement);
  const [ink, paper] = ["--ink", "--paper"].map((name) => styles.getPropertyValue(name));
  const lines = data.series.map((one) => one.name).filter(Boolean);
  const top = -(22 + 14 * lines.length);
  text([svg.dataset.title, svg.dataset.unit].filter(Boolean).join(", "), 4, top + 15, ink, "bold");
  const drawn = [...svg.querySelectorAll("path.line:not(.thin)")];
  lines.forEach((name, index) => {
    const y = top + 30 + 14 * index;
    const style = drawn[index] && getComputedStyle(drawn[index]);
    const dashes = style ? style.getPropertyValue("stroke-dasharray") : "none";
    copy.append(element("line", { x1: 4, x2: 26, y1: y - 4, y2: y - 4, stroke: style ? style.stroke : ink, "stroke-width": 1.8, "stroke-dasharray": dashes }));
    text(name, 31, y, ink);
  });
  copy.prepend(element("rect", { x: 0, y: top, width, height: height - top, fill: paper }));
  copy.querySelector(".cursor").remove();
  [...copy.attributes].forEach(({ name }) => name.startsWith("data-") && copy.removeAttribute(name));
  copy.setAttribute("viewBox", `0 ${top} ${width} ${height - top}`);
  copy.setAttribute("width", 2 * width);
  copy.setAttribute("height", 2 * (height - top));
  return new XMLSerializer().serializeToString(copy);
};
for (const plot of plots) {
  const name = plot.svg.dataset.title.toLowerCase().replace(/[^a-z0-9@]+/g, "-").replace(/^-|-$/g, "");
  for (const button of plot.svg.closest("figure").querySelectorAll("button[data-save]")) {
    button.addEventListener("click", () => {
      plot.rest();
      if (button.dataset.save === "csv") save(`${name}.csv`, "text/csv", csv(plot));
      else save(`${name}.svg`, "image/svg+xml", picture(plot));
    });
  }
}
