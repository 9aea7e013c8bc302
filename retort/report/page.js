"use strict";

// A pointer over one plot reads that place off every plot with the same x axis.
const plots = [...document.querySelectorAll("svg[data-plot]")].map((svg) => {
  const { x, at, series } = JSON.parse(svg.dataset.plot);
  const cursor = svg.querySelector(".cursor");
  const axis = svg.querySelector(".axis");
  const outputs = [...svg.closest("figure").querySelectorAll(".legend b"), axis]; // one for each curve, then x
  const resting = outputs.map((output) => output.textContent);
  const nearest = (values, wanted) =>
    values.reduce((best, value, index) => (Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? index : best), 0);
  return {
    svg,
    axis: svg.dataset.x,
    read(event) {
      const box = svg.getBoundingClientRect();
      return Number(at[nearest(x, ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width)]);
    },
    show(value) {
      const place = nearest(at.map(Number), value);
      cursor.setAttribute("x1", x[place]);
      cursor.setAttribute("x2", x[place]);
      cursor.classList.add("on");
      series.forEach((values, index) => (outputs[index].textContent = values[at[place]] ?? "–"));
      axis.textContent = `${svg.dataset.x} ${at[place]}`;
    },
    rest() {
      cursor.classList.remove("on");
      outputs.forEach((output, index) => (output.textContent = resting[index]));
    },
  };
});
for (const plot of plots) {
  const linked = plots.filter((other) => other.axis === plot.axis);
  plot.svg.addEventListener("pointermove", (event) => {
    const value = plot.read(event);
    linked.forEach((other) => other.show(value));
  });
  plot.svg.addEventListener("pointerleave", () => linked.forEach((other) => other.rest()));
}

// Shading of tokens; the same steps as `level` in rollouts.py.
const column = document.getElementById("column");
const shade = () => {
  const { scale, signed, low, high } = column.selectedOptions[0].dataset;
  for (const block of document.querySelectorAll(".tokens")) {
    const values = JSON.parse(block.dataset.columns)[column.value] ?? [];
    block.querySelectorAll(".t").forEach((token, index) => {
      const value = values[index];
      const steps = Math.min(5, Math.floor((5 * Math.abs(value)) / Number(scale) + 0.5));
      token.className = typeof value === "number" ? `t ${signed && value < 0 ? "n" : "p"}${steps}` : "t none";
    });
  }
  document.getElementById("low").textContent = low;
  document.getElementById("high").textContent = high;
  document.getElementById("negative").hidden = !signed;
};
column?.addEventListener("change", shade);
