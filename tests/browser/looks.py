# SPDX-License-Identifier: MIT
"""Whether a page can be read: nothing sticks out sideways, and text stands out from what is behind it."""

from playwright.sync_api import Page

# For each visible text: the least contrast of its colour with all colours that may be behind it, as WCAG 2 defines it
# (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio), where it is under 4.5, or 3 for large text.
_FAINT_TEXT = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const parse = (colour) => {  // [red, green, blue, alpha], each 0 to 1
    if (!known.has(colour)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      known.set(colour, [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255));
    }
    return known.get(colour);
  };
  const over = (front, back) => back.map((value, i) => front[i] * front[3] + value * (1 - front[3]));
  const luminance = (colour) => {
    const [r, g, b] = colour.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (light + 0.05) / (dark + 0.05);
  };
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.backgroundColor = "Canvas";
  const paper = parse(getComputedStyle(probe).backgroundColor).slice(0, 3);
  probe.remove();
  const behind = (element) => {  // all colours that may be behind it: gradients have several
    const layers = [];
    for (let one = element; one; one = one.parentElement) {
      const style = getComputedStyle(one);
      if (style.backgroundImage.includes("url(")) return [];
      layers.push([style.backgroundColor, style.backgroundImage.match(/(rgb|color|okl)[a-z]*\\([^()]*\\)/g) ?? []]);
    }
    let colours = [paper];
    for (const [plain, gradient] of layers.reverse()) {
      colours = colours.map((back) => over(parse(plain), back));
      colours = [...colours, ...gradient.flatMap((one) => colours.map((back) => over(parse(one), back)))];
    }
    return colours;
  };
  const faint = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    const text = texts.currentNode.data.trim();
    if (!text || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    if (element.closest(":disabled, [aria-disabled=true], [aria-hidden=true]")) continue;
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const style = getComputedStyle(element);
    const pixels = parseFloat(style.fontSize);
    const needed = pixels >= 24 || (pixels >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    const found = Math.min(...behind(element).map((back) => contrast(over(parse(style.color), back), back)));
    if (found < needed) faint.push(`${text.slice(0, 40)}: ${found.toFixed(2)}, needed ${needed}`);
  }
  return faint;
}"""


def faint_text(page: Page) -> list[str]:
    """Texts that stand out too little for WCAG's level AA, with what their contrast is."""
    return page.evaluate(_FAINT_TEXT)


def sticks_out(page: Page) -> list[str]:
    """What makes the page wider than the window; empty where nothing does."""
    return page.evaluate(
        """() => {
          const width = document.documentElement.clientWidth;
          const all = [...document.body.querySelectorAll("*")];
          const wide = all.filter((one) => one.getBoundingClientRect().right > width);
          const names = wide.slice(0, 5).map((one) => one.outerHTML.slice(0, 80));
          return document.documentElement.scrollWidth > width ? names : [];
        }"""
    )
