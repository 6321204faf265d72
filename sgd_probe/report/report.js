"use strict";
const PAPER_WIDTH = 980; // CSS pixels that an A4 page in landscape has inside its margins
const NARROW = window.matchMedia("(max-width: 40rem)");
const plots = [...document.querySelectorAll(".plot")];
const config = {
  responsive: true,
  displaylogo: false,
  // A list of our own: Plotly's default buttons include one that uploads the chart.
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};

const heightOf = (layout) => (NARROW.matches ? layout.meta.narrow_height : layout.meta.wide_height);

for (const plot of plots) {
  const json = document.querySelector(`script[data-for="${plot.dataset.figure}"]`).textContent;
  const { data, layout } = JSON.parse(json);
  layout.meta.wide_height = layout.height;
  Plotly.newPlot(plot, data, { ...layout, height: heightOf(layout) }, config);
}
NARROW.addEventListener("change", () => {
  for (const plot of plots) Plotly.relayout(plot, { height: heightOf(plot.layout) });
});
// A plot keeps the pixel width of the screen unless it is told that paper is narrower.
window.addEventListener("beforeprint", () => {
  for (const plot of plots) Plotly.relayout(plot, { autosize: false, width: PAPER_WIDTH });
});
window.addEventListener("afterprint", () => {
  for (const plot of plots) Plotly.relayout(plot, { autosize: true, width: null });
});
