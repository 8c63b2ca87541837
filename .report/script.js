"use strict";
const IMAGES = {};  // filled by images-<number>.js, which is loaded when its section scrolls into view
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const escaped = text => text.replace(/[&<>"]/g, c => `&#${c.charCodeAt()};`);

// ------------------------------------------------------------------------------------------------ tables and switch
for (const table of all("table")) {
  all("thead th", table).forEach((head, column) => head.firstElementChild?.addEventListener("click", () => {
    const down = head.ariaSort !== "descending" && column > 0 || head.ariaSort === "ascending";
    all("th", head.parentNode).forEach(th => th.ariaSort = null);
    head.ariaSort = down ? "descending" : "ascending";
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const order = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? isNaN(key(a)) - isNaN(key(b)) || (down ? -1 : 1) * key(a).localeCompare(key(b))
      : (down ? -1 : 1) * (key(a) - key(b));
    table.tBodies[0].append(...[...table.rows].slice(1).sort(order));
  }));
}
const choose = name => all(".metric").forEach(part => part.hidden = part.dataset.metric !== name);
all(".switch input").forEach(input => input.addEventListener("change", () => choose(input.value)));
if (all(".switch").length) choose(document.querySelector(".switch input:checked").value);

// ----------------------------------------------------------------------------------------------------- image browser
const digits = value => Number(value.toPrecision(4)).toString();

function start(section, data) {
  const form = section.querySelector("form"), cards = section.querySelector(".cards"), names = Object.keys(data.methods);
  const masks = new Set(data.masks), options = names.map(name => `<option>${escaped(name)}</option>`).join("");
  form.a.innerHTML = options;
  form.b.innerHTML += options;
  form.a.value = names.includes(section.dataset.method) ? section.dataset.method : names.find(name => data.methods[name].maps) ?? names[0];
  let order = [], shown = 0;

  function decision(name, i) {
    const flagged = data.methods[name].anomalous?.[i];
    return flagged === undefined ? "" : `${flagged === data.labels[i] ? "true" : "false"} ${flagged ? "positive" : "negative"}`;
  }
  function facts(name, i) {
    const method = data.methods[name], said = decision(name, i);
    return `<span class="facts">${digits(method.scores[i])} · percentile ${Math.round(method.percentiles[i])}`
      + (said ? ` · <span class="${said.startsWith("true") ? "right" : "wrong"}">${said}</span>` : "") + "</span>";
  }
  function view(name, i, contour = true) {
    const file = String(i).padStart(5, "0"), maps = name && data.methods[name].maps;
    const what = `${data.labels[i] ? "anomalous" : "normal"} test image ${data.paths[i]}${maps ? `, heat map of ${name}` : ""}`;
    return `<span class="view"><img loading="lazy" src="${data.images}${file}.jpg" alt="${escaped(what)}">`
      + (maps ? `<img loading="lazy" class="heat" src="${maps}${file}.png" alt="">` : "")
      + (contour && masks.has(i) ? `<img loading="lazy" class="mask" src="${data.images}${file}-mask.png" alt="">` : "") + "</span>";
  }
  const chosen = () => [form.a.value, form.b.value].filter(Boolean);

  function render() {
    const method = data.methods[form.a.value], count = data.paths.length, text = form.name.value.toLowerCase();
    const wrong = {}, rank = new Float64Array(count), all = Array.from({length: count}, (_, i) => i);
    all.forEach(i => (wrong[decision(form.a.value, i)] ??= []).push(i));
    [...all].sort((i, j) => method.scores[i] - method.scores[j]).forEach((i, place) => rank[i] = place / count);
    const error = i => (decision(form.a.value, i).startsWith("false") ? 1 : 0) + (data.labels[i] ? 1 - rank[i] : rank[i]);
    const keys = {worst: i => -error(i), high: i => -method.scores[i], low: i => method.scores[i], name: i => i}[form.order.value];
    const label = {normal: 0, anomalous: 1}[form.show.value];
    order = all.filter(i => (!form.show.value || (label !== undefined ? data.labels[i] === label : decision(form.a.value, i) === form.show.value))
      && data.paths[i].toLowerCase().includes(text)).sort((i, j) => keys(i) - keys(j));
    shown = 0;
    cards.innerHTML = "<i></i>";
    cards.scrollTop = 0;
    cards.classList.toggle("two", chosen().length > 1);
    const number = kind => (wrong[kind]?.length ?? 0).toLocaleString("en");
    section.querySelector(".status").textContent = `${order.length.toLocaleString("en")} of ${count.toLocaleString("en")} images. `
      + (method.threshold == null ? `${form.a.value} has no threshold.` : `${form.a.value}, seed ${method.seed}: ${number("false negative")} false negatives, `
      + `${number("false positive")} false positives at threshold ${digits(method.threshold)}.`);
    section.querySelector(".scales").innerHTML = chosen().map(scale).join("");
    watch.unobserve(cards.lastElementChild);
    watch.observe(cards.lastElementChild);
  }
  function scale(name) {
    const {range, pixel, maps} = data.methods[name];
    if (!maps || !range) return `<span>${escaped(name)}: no heat maps</span>`;
    const place = pixel == null ? -1 : 100 * (pixel - range[0]) / (range[1] - range[0]);
    return `<span class="scale"><b>${escaped(name)}</b> ${digits(range[0])} <span class="bar" role="img" aria-label="colour bar">`
      + (place >= 0 && place <= 100 ? `<i style="left: ${place}%" title="pixel threshold ${digits(pixel)}"></i>` : "")
      + `</span> ${digits(range[1])}${place >= 0 && place <= 100 ? ` (line: pixel threshold ${digits(pixel)})` : ""}</span>`;
  }
  const watch = new IntersectionObserver(entries => {  // adds cards near the end of the list
    if (!entries.some(entry => entry.isIntersecting) || shown >= order.length) return;
    const more = order.slice(shown, shown += 48).map(i => `<button type="button" class="card" data-image="${i}"><span class="pair">`
      + chosen().map(name => `<span>${view(name, i)}${facts(name, i)}</span>`).join("") + `</span><span class="path">${escaped(data.paths[i])}</span></button>`);
    const end = cards.lastElementChild;
    end.insertAdjacentHTML("beforebegin", more.join(""));
    watch.unobserve(end);
    watch.observe(end);
  }, {root: cards, rootMargin: "800px"});

  const dialog = document.getElementById("look");
  function look(place) {
    const i = order[place], figure = (what, caption) => `<figure>${what}<figcaption>${caption}</figcaption></figure>`;
    dialog.querySelector("h2").textContent = data.paths[i];
    dialog.querySelector("#look-place").textContent = `${place + 1} of ${order.length}, ${data.labels[i] ? "anomalous" : "normal"}`;
    dialog.querySelector(".views").innerHTML = figure(view("", i, false), "image")
      + (masks.has(i) ? figure(view("", i), "ground truth") : "")
      + chosen().map(name => figure(view(name, i), scale(name) + facts(name, i))).join("");
    const step = by => look(Math.min(Math.max(place + by, 0), order.length - 1));
    dialog.querySelector("[name=previous]").onclick = () => step(-1);
    dialog.querySelector("[name=next]").onclick = () => step(1);
    dialog.onkeydown = event => ({ArrowLeft: -1, ArrowRight: 1})[event.key] && step({ArrowLeft: -1, ArrowRight: 1}[event.key]);
    if (!dialog.open) dialog.showModal();
  }
  cards.addEventListener("click", event => {
    const card = event.target.closest(".card");
    if (card) look(order.indexOf(Number(card.dataset.image)));
  });
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", event => event.target.name === "heat" ?
    document.documentElement.style.setProperty("--heat", event.target.value) : render());
  section.show = name => { form.a.value = name; render(); };
  render();
}

const near = new IntersectionObserver(entries => entries.filter(entry => entry.isIntersecting).forEach(({target}) => {
  near.unobserve(target);
  const script = document.createElement("script");
  script.src = `images-${target.dataset.number}.js`;
  script.onload = () => start(target, IMAGES[target.dataset.number]);
  document.head.append(script);
}), {rootMargin: "600px"});
all(".browser").forEach(section => near.observe(section));
all("a[data-method]").forEach(link => link.addEventListener("click", () => {
  const section = document.querySelector(link.hash);
  section.dataset.method = link.dataset.method;  // in case the section is not loaded yet
  section.show?.(link.dataset.method);
}));
