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

// Plotly is in the page as base64 of a zlib stream, a third of its size; nothing is fetched.
const unpack = async () => {
  const packed = atob(document.getElementById("plotly").textContent);
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
};

const draw = async () => {
  await unpack();
  for (const plot of plots) {
    const json = document.querySelector(`script[data-for="${plot.dataset.figure}"]`).textContent;
    const { data, layout } = JSON.parse(json);
    layout.meta.wide_height = layout.height;
    await Plotly.newPlot(plot, data, { ...layout, height: heightOf(layout) }, config);
  }
  document.documentElement.dataset.drawn = plots.length;
};
draw().catch((error) => {
  for (const plot of plots) plot.textContent = "This browser cannot draw the figures; the tables hold their numbers.";
  throw error;
});
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
