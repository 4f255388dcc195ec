// The image to paint on. Boxes and strokes are told to the page in shares of width and height.
const shapes = [];
let drawing = null;
const canvas = () => element.querySelector("canvas");
const chosen = () => element.querySelector("input[name=pc-tool]:checked").value;
const width = () => element.querySelector("input[name=pc-width]").value / 100;
const clip = (value) => Math.min(Math.max(value, 0), 1);

function place(event) {
  const area = canvas().getBoundingClientRect();
  return [clip((event.clientX - area.left) / area.width), clip((event.clientY - area.top) / area.height)];
}

function draw() {
  const area = canvas();
  if (!area) return;
  [area.width, area.height] = [area.clientWidth, area.clientHeight];
  const pen = area.getContext("2d");
  pen.fillStyle = pen.strokeStyle = "rgba(127, 255, 212, 0.6)";
  pen.lineCap = pen.lineJoin = "round";
  for (const shape of drawing ? [...shapes, drawing] : shapes) {
    const points = shape.points.map(([x, y]) => [x * area.width, y * area.height]);
    const [[left, top], [right, bottom]] = [points[0], points[points.length - 1]];
    if (shape.tool === "box") {
      pen.fillRect(left, top, right - left, bottom - top);
    } else {
      pen.lineWidth = shape.width * area.width;
      pen.beginPath();
      pen.moveTo(left, top);
      points.forEach(([x, y]) => pen.lineTo(x, y));
      if (points.length === 1) pen.lineTo(left + 0.1, top);
      pen.stroke();
    }
  }
}

function tell() {
  draw();
  trigger("input", { shapes: shapes.slice() });
}

function clear() {
  shapes.length = 0;
  drawing = null;
}

element.addEventListener("pointerdown", (event) => {
  if (event.target !== canvas()) return;
  event.target.setPointerCapture(event.pointerId);
  drawing = { tool: chosen(), width: width(), points: [place(event)] };
  draw();
});
element.addEventListener("pointermove", (event) => {
  if (!drawing || event.target !== canvas()) return;
  if (drawing.tool === "box") drawing.points[1] = place(event);
  else drawing.points.push(place(event));
  draw();
});
element.addEventListener("pointerup", (event) => {
  if (!drawing || event.target !== canvas()) return;
  if (drawing.tool === "brush" || drawing.points.length > 1) shapes.push(drawing);
  drawing = null;
  tell();
});
element.addEventListener("click", (event) => {
  if (!event.target.closest("[data-clear]")) return;
  clear();
  tell();
});
element.addEventListener("keydown", (event) => {
  if (!event.target.matches(".pc-paint")) return;
  const step = { ArrowLeft: [-0.02, 0], ArrowRight: [0.02, 0], ArrowUp: [0, -0.02], ArrowDown: [0, 0.02] }[event.key];
  if (step) {
    drawing = drawing || { tool: "box", width: 0, points: [[0.4, 0.4], [0.6, 0.6]] };
    const moved = event.shiftKey ? [drawing.points[1]] : drawing.points;
    moved.forEach((point) => step.forEach((by, axis) => (point[axis] = clip(point[axis] + by))));
    draw();
  } else if (event.key === "Enter" && drawing) {
    shapes.push(drawing);
    drawing = null;
    tell();
  } else if (event.key === "Escape") {
    clear();
    tell();
  } else return;
  event.preventDefault();
});
watch("value", () => {
  clear();
  draw();
});
new ResizeObserver(draw).observe(element);
