"use strict";
// Says the values of a chart where the pointer is, or where the arrow keys went.

for (const figure of document.querySelectorAll("figure.drawn")) {
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor"), said = figure.querySelector("output");
  const curves = [...svg.querySelectorAll("path[data-values]")].filter(path => path.dataset.values).map(path => (
    { label: path.dataset.label, values: path.dataset.values.split(" "),  // x y x y ...; places: where each x is drawn
      places: path.getAttribute("d").match(/-?[\d.]+/g).filter((_, i) => i % 2 === 0).map(Number) }));
  const stops = [...new Set(curves.flatMap(curve => curve.places))].sort((a, b) => a - b);
  let current = -1;
  if (!stops.length) continue;

  const nearest = (places, wanted) => places.reduce((best, place, i) => (
    Math.abs(place - wanted) < Math.abs(places[best] - wanted) ? i : best), 0);
  const show = index => {
    current = Math.max(0, Math.min(stops.length - 1, index));
    cursor.setAttribute("x1", stops[current]);
    cursor.setAttribute("x2", stops[current]);
    const found = curves.map(({ label, values, places }) => {
      const i = nearest(places, stops[current]);
      return { label, x: values[2 * i], y: values[2 * i + 1], here: places[i] === stops[current] };
    });
    const x = found.find(point => point.here).x;
    said.textContent = `${svg.querySelector(".across").textContent} ${x}: ` + found.map(point => (
      `${point.label} ${point.y}${point.x === x ? "" : ` (at ${point.x})`}`)).join(", ");
  };
  const follow = event => {
    const box = svg.getBoundingClientRect();
    show(nearest(stops, (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width));
  };

  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("keydown", event => {
    const steps = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: stops.length - 1 };
    if (!(event.key in steps)) return;
    show(steps[event.key]);
    event.preventDefault();
  });
}
