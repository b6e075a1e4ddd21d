"use strict";
// Shows the groups of a step. All data come from #data; texts are set as text, never as HTML.

async function readData() {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const byId = (id) => document.getElementById(id);
const element = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};
const shown = (value) => (value == null ? "–" : typeof value === "number" ? String(+value.toPrecision(4)) : String(value));

const column = (c, name, i) => {
  const values = c.tokens[name];
  return Array.isArray(values) ? values[i] : values;
};
const minus = (a, b) => (a == null || b == null ? null : a - b);
const difference = (c, i) => minus(column(c, "trainer_logprobs", i), column(c, "sampler_logprobs", i));
const logRatio = (c, i) => minus(column(c, "logprobs", i), column(c, "old_logprobs", i));
const ratio = (c, i) => { const x = logRatio(c, i); return x == null ? null : Math.exp(x); };

// Each: [name, value of a token, colour by it: {low, high, middle}], where a colour runs from 0 at `middle` to full.
const QUANTITIES = [
  ["sampler's log-probability", (c, i) => column(c, "sampler_logprobs", i), { low: -4, high: 4 }],
  ["trainer's log-probability", (c, i) => column(c, "trainer_logprobs", i), { low: -4, high: 4 }],
  ["difference, trainer less sampler", difference, { low: -0.1, high: 0.1 }],
  ["ratio, and clipped", ratio, { low: 0.8, high: 1.2, middle: 1 }],
  ["advantage", (c, i) => column(c, "token_advantages", i), { low: -1.5, high: 1.5 }],
  ["mask: weighs in the loss", (c, i) => column(c, "weighs", i), { low: -1, high: 1 }],
  ["policy version", (c, i) => column(c, "token_versions", i), null],
  ["reference's log-probability", (c, i) => column(c, "ref_logprobs", i), { low: -4, high: 4 }],
];

const SORTS = {
  "as sampled": (g) => g.number,
  "worst mismatch": (g) => -g.mismatch,
  "longest": (g) => -Math.max(...g.completions.map((c) => c.length)),
  "lowest reward": (g) => sum(g.completions.map((c) => c.reward)) / g.completions.length,
  "highest reward": (g) => -sum(g.completions.map((c) => c.reward)) / g.completions.length,
  "most clipped tokens": (g) => -sum(g.completions.map(numClipped)),
};
const FILTERS = {
  "all groups": () => true,
  "all wrong": (g) => g.wrong,
  "all rewards equal": (g) => new Set(g.completions.map((c) => c.reward)).size === 1,
  "some right, some wrong": (g) => new Set(g.completions.map((c) => c.reward)).size > 1,
  "with cut completions": (g) => g.completions.some((c) => c.finish === "length"),
  "with repeated text": (g) => g.completions.some((c) => c.repeats),
  "with clipped tokens": (g) => g.completions.some((c) => numClipped(c) > 0),
  "dropped": (g) => g.completions.some((c) => c.dropped),
};
const sum = (values) => values.reduce((a, b) => a + (b || 0), 0);
const numClipped = (c) => (Array.isArray(c.tokens.is_clipped) ? sum(c.tokens.is_clipped) : (c.tokens.is_clipped || 0) * c.length);

// Characters that cannot be seen, or that would move others, as signs.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/gu;
const sign = (ch) => (ch === "\n" ? "⏎\n" : ch === "\t" ? "⇥\t" : ch < " " ? String.fromCharCode(0x2400 + ch.charCodeAt(0)) : `⟨U+${ch.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
const visible = (text) => text.replace(HIDDEN, sign);
const textOf = (id) => (id in page.texts ? visible(page.texts[id]) || "∅" : `[${id}]`);

// Blue above the middle, red below it; the stronger, the further away.
function paint(value, scale, versions) {
  if (value == null) return "transparent";
  if (!scale) return `hsl(${(versions.indexOf(value) * 67 + 200) % 360} 70% 50% / .35)`;
  const middle = scale.middle || 0;
  const share = value >= middle ? (value - middle) / (scale.high - middle) : (middle - value) / (middle - scale.low);
  const strength = Math.min(1, share) * 0.75;
  return value >= middle ? `rgba(50, 120, 230, ${strength})` : `rgba(230, 60, 60, ${strength})`;
}

function legend() {
  const [, , scale] = QUANTITIES[settings.quantity];
  const node = byId("legend");
  node.replaceChildren();
  const steps = scale ? [0, 0.25, 0.5, 0.75, 1].map((x) => scale.low + x * (scale.high - scale.low)) : versions;
  for (const value of steps.filter((v) => !scale || scale.low >= -0.5 || scale.high <= 1.5 || v <= 0)) {
    const box = element("span", "", shown(value));
    box.style.background = paint(value, scale, versions);
    node.append(box);
  }
  if (QUANTITIES[settings.quantity][0].startsWith("ratio")) node.append(element("span", "warn", "underlined: clipped"));
}

function tokensOf(c) {
  const body = element("div", "body");
  const ids = c.tokens.token_ids;
  if (ids == null) {
    body.append(element("span", "text", visible(c.text)));
    return body;
  }
  const [, value, scale] = QUANTITIES[settings.quantity];
  for (let i = 0; i < c.length; i++) {
    const token = element("span", "token", textOf(column(c, "token_ids", i)));
    token.style.background = paint(value(c, i), scale, versions);
    if (column(c, "is_clipped", i)) token.style.borderBottom = "2px solid var(--warn)";
    if (column(c, "weighs", i) === 0) token.classList.add("unmasked");
    token.dataset.i = i;
    body.append(token);
  }
  body.completion = c;
  return body;
}

function completionNode(c) {
  const node = element("div", "completion");
  if (c.reward > 0) node.classList.add("good");
  const facts = element("p", "facts");
  facts.append(element("b", "", `reward ${shown(c.reward)}`));
  const parts = Object.entries(c.parts).map(([name, value]) => `${name} ${shown(value)}`);
  const more = [parts.length ? `(${parts.join(", ")})` : "", c.advantage == null ? "" : `advantage ${shown(c.advantage)}`,
    `${c.length} tokens`, c.finish === "length" ? "cut at the limit" : `finish ${c.finish}`,
    c.seed == null ? "" : `seed ${c.seed}`, `version ${shown(c.version)}`,
    c.mismatch == null ? "" : `mismatch ${shown(c.mismatch)}`,
    c.repeats ? "repeats itself" : "", c.dropped ? "dropped" : "", numClipped(c) ? `${numClipped(c)} clipped` : ""];
  facts.append(document.createTextNode(" · " + more.filter(Boolean).join(" · ")));
  node.append(facts, tokensOf(c));
  return node;
}

function groupNode(group) {
  const node = element("section", "group");
  node.append(element("b", "", `Group ${group.number}`), element("span", "about", ` ${group.id} · ground truth `), element("code", "truth", visible(group.truth)));
  node.append(element("div", "text", visible(group.prompt).trim()));
  const row = element("div", "row");
  row.append(...group.completions.map(completionNode));
  node.append(row);
  return node;
}

function chosen() {
  const words = settings.search.toLowerCase();
  const has = (g) => !words || [g.prompt, g.truth, ...g.completions.map((c) => c.text)].some((t) => t.toLowerCase().includes(words));
  const key = SORTS[settings.sort];
  return page.groups.filter((g) => FILTERS[settings.show](g) && has(g)).sort((a, b) => key(a) - key(b));
}

const AT_ONCE = 8; // groups that are laid out; a step's hundred thousands of tokens at once would take seconds

function drawAll() {
  const groups = chosen();
  byId("groups").replaceChildren(...groups.slice(0, settings.most).map(groupNode));
  byId("count").textContent = `${groups.length} of ${page.groups.length} groups`;
  byId("more").hidden = groups.length <= settings.most;
  legend();
}

function showTip(event) {
  const tip = byId("tip");
  const token = event.target.closest ? event.target.closest(".token") : null;
  const c = token && token.parentNode.completion;
  tip.hidden = !c;
  if (!c) return;
  const i = +token.dataset.i;
  const rows = [["token", `${i}: ${textOf(column(c, "token_ids", i))} (id ${column(c, "token_ids", i)})`]];
  for (const [name, value] of QUANTITIES) if (value(c, i) != null) rows.push([name, shown(value(c, i))]);
  if (c.tokens.is_clipped != null) rows.push(["clipped", column(c, "is_clipped", i) ? "yes" : "no"]);
  const table = element("table");
  for (const [name, text] of rows) {
    const row = element("tr");
    row.append(element("td", "", name), element("td", "", text));
    table.append(row);
  }
  tip.replaceChildren(table);
  const box = token.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  const below = box.bottom + 6;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? Math.max(4, box.top - tip.offsetHeight - 6) : below}px`;
}

function options(id, names, set) {
  byId(id).replaceChildren(...names.map((name) => new Option(name, name)));
  byId(id).addEventListener("change", (event) => { set(event.target); settings.most = AT_ONCE; drawAll(); });
}

function listen() {
  const first = page.groups.flatMap((g) => g.completions)[0];
  options("quantity", QUANTITIES.map(([name]) => name), (select) => (settings.quantity = select.selectedIndex));
  QUANTITIES.forEach(([, value], i) => (byId("quantity").options[i].disabled = !first || value(first, 0) == null));
  options("sort", Object.keys(SORTS), (select) => (settings.sort = select.value));
  options("show", Object.keys(FILTERS), (select) => (settings.show = select.value));
  byId("search").addEventListener("input", (event) => { settings.search = event.target.value; settings.most = AT_ONCE; drawAll(); });
  byId("plain").addEventListener("change", (event) => document.body.classList.toggle("plain", event.target.checked));
  byId("more").addEventListener("click", () => { settings.most += AT_ONCE; drawAll(); });
  document.addEventListener("mouseover", showTip);
}

const settings = { quantity: 0, sort: "as sampled", show: "all groups", search: "", most: AT_ONCE };
let page, versions;

readData().then((data) => {
  page = data;
  const all = page.groups.flatMap((g) => g.completions.flatMap((c) => c.tokens.token_versions ?? []));
  versions = [...new Set(all)].sort((a, b) => a - b);
  listen();
  drawAll();
  document.body.dataset.ready = String(Math.round(performance.now()));
});
