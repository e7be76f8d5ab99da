// Elements, texts and numbers.

const UNNAMED = "no clear name";
const INPUTS = { image: "images", text: "text" };
const CODES = { before_topk: "before TopK", after_topk: "after TopK" };
const KINDS = { vlm: "vision-language", vision: "vision", language: "language", untrained: "untrained" };

/** An element: its tag and classes, such as "p.note", its properties, if any, and its content. Texts never become markup. */
function h(tag, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  const properties = children[0]?.constructor === Object ? children.shift() : {};
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (value !== null && value !== undefined && value !== false)
      element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => (child ?? false) !== false));
  return element;
}

const anchor = (href, ...children) => h("a", { href }, ...children);
const section = (title, ...children) => h("section", h("h2", title), ...children);
/** A bar as long as a share of its room. */
const meter = (share) => h("span.meter", { "aria-hidden": "true" }, h("span", { style: { width: `${100 * share}%` } }));

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** For titles and labels, which cannot isolate marks of direction and control characters. */
const plain = (text) => text.replace(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069]+/g, " ");
const words = (text) => h("bdi", text);
/** A feature's name, or in grey its best candidate if no name is clear. */
const named = ({ name, candidate }) =>
  name?.trim() ? words(name) : h("span.quiet", candidate?.trim() ? ["perhaps ", words(candidate)] : UNNAMED);
const calledIn = (table, feature) => ({ name: table.name[feature], candidate: table.candidate[feature] });

const kindOf = ({ modality, kind }) => `${INPUTS[modality]}, ${KINDS[kind]}`;
const describe = (member) => `reads ${kindOf(member)} model`;

const whole = (number) => number.toLocaleString("en");
const or = (number, write) => (number === null || number === undefined ? "–" : write(number));
const fixed = (number) => or(number, (value) => value.toFixed(2));
const size = (number) =>
  or(number, (value) => (Math.abs(value) >= 1000 ? whole(Math.round(value)) : String(Number(value.toPrecision(3)))));
const percent = (number) => or(number, (value) => `${Number((100 * value).toPrecision(3))}%`);
const plural = (number, one) => `${whole(number)} ${one}${number === 1 ? "" : "s"}`;

function probability(log10) {
  if (log10 === null || log10 === undefined) return "–";
  if (log10 > -3) return (10 ** log10).toPrecision(2);
  const power = Math.floor(log10);
  const raised = String(power).replace(/./g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit] ?? "⁻");
  return `${(10 ** (log10 - power)).toFixed(1)} × 10${raised}`;
}

const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries)
      if (isIntersecting) {
        watcher.unobserve(target);
        fill(target, target.whenSeen);
      }
  },
  { rootMargin: "400px" },
);

async function fill(element, make) {
  try {
    element.replaceChildren(...[await make()].flat());
  } catch (error) {
    if (!(error instanceof FileError)) throw error;
    element.replaceChildren(h("span.error", error.message));
  }
}

/** Fill an element when it comes into view. */
function lazily(element, make) {
  element.whenSeen = make;
  watcher.observe(element);
  return element;
}
