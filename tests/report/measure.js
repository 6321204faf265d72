// Looks at a page from inside, once it says that its figures are drawn, and tells the page around it.
"use strict";
const all = (selector) => [...document.querySelectorAll(selector)];
const start = (element) => element.outerHTML.slice(0, 90);

const luminance = (colour) => {
  const [red, green, blue] = colour.match(/[0-9.]+/g).map((value) => value / 255)
    .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const backdrop = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!colour.endsWith(", 0)")) return colour;
  }
  return "rgb(255, 255, 255)";
};
const contrast = (element) => {
  const [one, other] = [getComputedStyle(element).color, backdrop(element)].map(luminance);
  return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
};
const hasText = (element) => [...element.childNodes].some(
  (node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
const texts = () => all("body *").filter((element) => hasText(element) && !element.closest(".plot, script"));
const showsFocus = (element) => {
  element.focus({ focusVisible: true });
  return document.activeElement === element && getComputedStyle(element).outlineStyle !== "none";
};
const isDrawn = (plot) => plot.querySelector(
  ".main-svg .scatterlayer .trace, .main-svg .heatmaplayer image, .main-svg .infolayer .annotation");

const measure = () => parent.postMessage({
  frame: name,
  width: innerWidth,
  scroll: document.documentElement.scrollWidth,
  figures: all("div.plot").length,
  drawn: all("div.plot").filter(isDrawn).length,
  hidden: all("div.plot").filter((plot) => plot.offsetHeight < 200).length,
  clipped: all(".main-svg").filter((svg) => svg.getBoundingClientRect().right > innerWidth)
    .map((svg) => svg.closest(".plot").dataset.figure),
  pale: texts().filter((element) => contrast(element) < 4.5).map(start),
  unfocused: all("a, summary, [tabindex='0']").filter((element) => !showsFocus(element)).map(start),
  covered: all("tbody th").filter((header) => header.offsetWidth > 0.6 * innerWidth).map(start),
  owned: all(".owned").map(start),
  title: document.title,
  buttons: all(".modebar-btn").map((button) => button.dataset.title),
}, "*");

const waiting = setInterval(() => {
  if (document.documentElement.dataset.drawn) {
    clearInterval(waiting);
    setTimeout(measure, 300);
  }
}, 50);
