"use strict";

// A page in a folder may load scripts, and no other files: the numbers come as scripts,
// data.js with `ATLAS.start`, the others, when they are needed, with `ATLAS.loaded`.
const ATLAS = (() => {
  const STEP = 60; // entries of a list that are added at once
  const waiting = {};
  const places = {}; // where a view was left
  let data, view, forward = false;

  function bytes(text) {
    const raw = atob(text);
    const found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
    return found;
  }

  function load(name) {
    if (!waiting[name]) {
      const entry = waiting[name] = {};
      entry.promise = new Promise((resolve, reject) => {
        entry.resolve = resolve;
        const script = document.createElement("script");
        script.src = `files/${name}.js`;
        script.onerror = () => reject(new Error(`files/${name}.js is missing`));
        document.head.append(script);
      });
    }
    return waiting[name].promise;
  }

  function loaded(name, text) {
    waiting[name].resolve(bytes(text));
  }

  // Elements

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  const whenSeen = new IntersectionObserver(entries => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      whenSeen.unobserve(entry.target);
      entry.target.seen();
    }
  }, { rootMargin: "400px" });

  function seen(element, action) {
    element.seen = action;
    whenSeen.observe(element);
    return element;
  }

  // One picture of a sheet of so many columns and rows.
  function tile(file, column, row, columns, rows, label) {
    const element = make("span", { class: "tile", role: "img", "aria-label": label });
    if (data.side < 64) element.classList.add("pixels");
    const at = (i, n) => `${n > 1 ? 100 * i / (n - 1) : 0}%`;
    element.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
    element.style.backgroundPosition = `${at(column, columns)} ${at(row, rows)}`;
    return seen(element, () => { element.style.backgroundImage = `url(files/${file}.jpg)`; });
  }

  const numbered = (name, number) => `${name}-${String(number).padStart(4, "0")}`;

  function photo(image) {
    const n = data.sheet, sheet = Math.floor(image / (n * n)), place = image % (n * n);
    const left = Math.min(n * n, data.names.length - sheet * n * n);
    return tile(numbered("sheet", sheet), place % n, Math.floor(place / n), n,
      Math.ceil(left / n), data.names[image]);
  }

  function region(concept, i) {
    const examples = data.concepts[concept].examples;
    return tile(numbered("region", concept), i, 0, examples.length, 1,
      `region of ${data.names[examples[i][0]]}`);
  }

  // A map as a picture with a pixel per patch; `pixel` gives red, green, blue, opacity.
  function mapCanvas(map, pixel, attributes) {
    const [rows, columns] = data.grid;
    const canvas = make("canvas", { width: columns, height: rows, ...attributes });
    const context = canvas.getContext("2d");
    const picture = context.createImageData(columns, rows);
    map.forEach((value, i) => picture.data.set(pixel(value), 4 * i));
    context.putImageData(picture, 0, 0);
    return canvas;
  }

  function heat(map, label) {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const colour = dark ? [143, 164, 255] : [61, 91, 217];
    return mapCanvas(map, v => [...colour, 255 * v],
      { class: "heat", role: "img", "aria-label": label });
  }

  // As `lit_region` draws it: dark but for a fifth where a part has less than half of its
  // largest value.
  const light = map => mapCanvas(map, v => [0, 0, 0, v < .5 ? 204 : 0], {});

  // Maps of an image: of each part in 0 to 1, and the part with most of each patch.
  async function mapsOf(image) {
    const n = data.sheet * data.sheet, patches = data.grid[0] * data.grid[1];
    const values = await load(numbered("maps", Math.floor(image / n)));
    const half = Math.ceil(data.parts * patches / 2), size = half + patches;
    const start = (image % n) * size;
    const at = i => (values[start + (i >> 1)] >> (i % 2 ? 0 : 4) & 15) / 15;
    const map = part => Array.from({ length: patches }, (_, i) => at(part * patches + i));
    return { map, strongest: values.subarray(start + half, start + size) };
  }

  function litPhoto(image, part) {
    const element = photo(image), show = element.seen;
    return seen(element, () => {
      show();
      mapsOf(image).then(maps => element.append(light(maps.map(part))));
    });
  }

  // A list that grows while it is scrolled.
  function list(items, entry, kind = "") {
    const element = make("ul", { class: `grid ${kind}` });
    let count = 0;
    const add = () => {
      const more = items.slice(count, count + STEP).map(item => make("li", {}, entry(item)));
      element.append(...more);
      count += more.length;
      if (count < items.length) seen(more[more.length - 1], add);
    };
    element.grow = least => { while (count < Math.min(least, items.length)) add(); };
    add();
    return element;
  }

  // Words

  const percent = share => {
    const value = 100 * share;
    const digits = value >= 10 ? value.toFixed(0) : value >= .1 ? value.toFixed(1) : value.toPrecision(1);
    return `${digits}\u00a0%`;
  };
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  const title = concept => {
    const { prototype } = data.concepts[concept];
    return prototype === undefined ? `Concept ${concept}` : `Concept ${concept}, prototype ${prototype}`;
  };
  const folderOf = image => data.labels ? data.folders[data.labels[image]] : "";
  const link = (hash, ...children) => make("a", { href: hash }, ...children);
  const caption = (bold, text = "") => make("span", { class: "caption" }, make("b", {}, bold), text);

  // Numbers

  const mass = (image, part) => data.masses[image * data.parts + part];
  const conceptOf = (image, part) => data.of_part[image * data.parts + part];
  const isAbsent = (image, part) => mass(image, part) < data.absent;

  function imagesOf(concept) {
    const found = [];
    for (let image = 0; image < data.names.length; image++) {
      let share = 0, best = -1;
      for (let part = 0; part < data.parts; part++) {
        if (conceptOf(image, part) !== concept || isAbsent(image, part)) continue;
        share += mass(image, part);
        if (best < 0 || mass(image, part) > mass(image, best)) best = part;
      }
      if (best >= 0) found.push({ image, part: best, share });
    }
    return found.sort((a, b) => b.share - a.share);
  }

  // Images with the parts most similar to one, by products of codes.
  async function similar(image, part) {
    const weights = data.codes.weights, size = weights.length;
    const codes = new Int8Array((await load("codes")).buffer);
    const start = (image * data.parts + part) * size;
    const query = weights.map((w, d) => w * codes[start + d]);
    const found = [];
    for (let other = 0; other < data.names.length; other++) {
      if (other === image) continue;
      let best = null;
      for (let p = 0; p < data.parts; p++) {
        if (isAbsent(other, p)) continue;
        const from = (other * data.parts + p) * size;
        let cosine = 0;
        for (let d = 0; d < size; d++) cosine += query[d] * codes[from + d];
        if (!best || cosine > best.cosine) best = { image: other, part: p, cosine };
      }
      if (best) found.push(best);
    }
    return found.sort((a, b) => b.cosine - a.cosine).slice(0, data.codes.shown);
  }

  // Views

  function conceptCard(concept) {
    const entry = data.concepts[concept];
    const tiles = entry.examples.slice(0, 4).map((_, i) => region(concept, i));
    const [first] = entry.folders || [];
    const text = first ? `${data.folders[first[0]]} ${percent(first[1])}` : plural(entry.images, "image");
    return link(`#concept=${concept}`,
      make("span", { class: "head" }, make("b", {}, title(concept)),
        make("span", {}, `covers ${percent(entry.coverage)}`)),
      make("span", { class: "row" }, ...tiles, heat(entry.mean_map, "where it lies")),
      caption("", text));
  }

  const imageCard = image => link(`#image=${image}`, photo(image), caption("", data.names[image]));

  const partCard = (image, part, text) => link(`#image=${image}&token=${part}`,
    litPhoto(image, part), caption(text, ` ${data.names[image]}`));

  function heading(text, note) {
    return [make("h2", { tabindex: -1 }, text), make("p", { class: "note" }, note)];
  }

  function steps(kind, number, count) {
    const element = make("p", { class: "steps" });
    if (number > 0) element.append(make("a", { href: `#${kind}=${number - 1}`, rel: "prev" }, "← previous"));
    if (number < count - 1) element.append(make("a", { href: `#${kind}=${number + 1}`, rel: "next" }, "next →"));
    return element;
  }

  const all = count => Array.from({ length: count }, (_, i) => i);

  function showConcepts() {
    view.append(...heading(plural(data.concepts.length, "concept"),
      `Those that cover most of the ${plural(data.names.length, "image")} first.`),
      list(all(data.concepts.length), conceptCard, "concepts"));
  }

  function showImages() {
    view.append(...heading(plural(data.names.length, "image"), "In the order of their names."),
      list(all(data.names.length), imageCard));
  }

  function showFound(text) {
    const has = name => name.toLowerCase().includes(text.toLowerCase());
    const concepts = all(data.concepts.length).filter(c =>
      has(title(c)) || (data.concepts[c].folders || []).some(f => has(data.folders[f[0]])));
    const images = all(data.names.length).filter(image => has(data.names[image]));
    view.append(...heading(`“${text}”`,
      `${plural(concepts.length, "concept")} and ${plural(images.length, "image")}`));
    if (concepts.length) view.append(list(concepts, conceptCard, "concepts"));
    if (images.length) view.append(list(images, imageCard));
  }

  function folderList(entry) {
    return make("ul", { class: "folders" }, ...entry.folders.map(([folder, share, lift]) =>
      make("li", {}, make("span", {}, data.folders[folder]), make("span", {}, percent(share)),
        make("small", {}, `${lift.toPrecision(2)} × its share`))));
  }

  function showConcept(concept) {
    const entry = data.concepts[concept], images = imagesOf(concept);
    const facts = make("div", {}, make("p", {},
      `Covers ${percent(entry.coverage)} of the area of all images; ${plural(entry.parts, "part")} ` +
      `in ${entry.images} of ${plural(data.names.length, "image")}.`));
    if (entry.folders) facts.append(make("p", {}, "Folders that its area lies in:"), folderList(entry));
    view.append(steps("concept", concept, data.concepts.length), ...heading(title(concept), ""),
      make("div", { class: "facts" }, make("div", {}, heat(entry.mean_map, "where it lies"),
        caption("", "where it lies")), facts),
      make("h3", {}, "Typical regions"),
      list(all(entry.examples.length), i => {
        const [image, part, similarity] = entry.examples[i];
        return link(`#image=${image}&token=${part}`, region(concept, i),
          caption(similarity.toFixed(2), ` ${data.names[image]}`));
      }));
    if (entry.neighbours.length) {
      view.append(make("h3", {}, "Nearest concepts"),
        list(entry.neighbours, ([other, cosine]) => link(`#concept=${other}`, region(other, 0),
          caption(cosine.toFixed(2), ` ${title(other)}`))));
    }
    view.append(make("h3", {}, "Images, those that have most of it first"),
      list(images, found => partCard(found.image, found.part, percent(found.share))));
  }

  function partEntry(image, part, maps, choose) {
    const concept = conceptOf(image, part), absent = isAbsent(image, part);
    const text = absent ? "absent" : percent(mass(image, part));
    const open = make("a", { class: `part${absent ? " absent" : ""}`, href: `#image=${image}&token=${part}` },
      heat(absent ? maps.map(part).fill(0) : maps.map(part), `map of part ${part}`), `part ${part}, ${text}`);
    open.addEventListener("click", event => { event.preventDefault(); choose(part); });
    const entry = make("li", { "data-part": part }, open);
    if (concept >= 0) entry.append(link(`#concept=${concept}`, title(concept)));
    return entry;
  }

  async function showImage(image, token) {
    const large = photo(image), hint = make("p", { class: "note" }, "Click into the picture, or on a part.");
    large.classList.add("picture");
    const parts = make("ul", { class: "parts" }), results = make("section");
    view.append(steps("image", image, data.names.length), ...heading(data.names[image], folderOf(image)),
      make("div", { class: "image" },
        make("div", {}, large, hint),
        make("div", {}, parts)), results);
    const maps = await mapsOf(image);
    if (!large.isConnected) return; // the user has gone on
    let layer = null, chosen = null;
    const choose = async part => {
      chosen = part;
      history.replaceState(null, "", `#image=${image}&token=${part}`);
      layer?.remove();
      layer = isAbsent(image, part) ? null : light(maps.map(part));
      if (layer) large.append(layer);
      for (const entry of parts.children) {
        const same = Number(entry.dataset.part) === part;
        entry.classList.toggle("chosen", same);
        entry.firstChild.setAttribute("aria-current", same);
      }
      if (isAbsent(image, part)) {
        results.replaceChildren(make("p", { class: "note" }, `Part ${part} is absent from this image.`));
        return;
      }
      const found = await similar(image, part);
      if (chosen !== part || !large.isConnected) return;
      const below = make("button", { type: "button" }, "similar parts ↓");
      below.addEventListener("click", () => results.scrollIntoView());
      hint.replaceChildren(`Part ${part}: `, below);
      results.replaceChildren(make("h3", {}, `Most similar to part ${part} in other images`),
        list(found, f => partCard(f.image, f.part, f.cosine.toFixed(2))));
    };
    const order = all(data.parts).sort((a, b) => mass(image, b) - mass(image, a));
    parts.append(...order.map(part => partEntry(image, part, maps, choose)));
    large.addEventListener("click", event => {
      const box = large.getBoundingClientRect(), [rows, columns] = data.grid;
      const cell = (at, size, count) => Math.min(count - 1, Math.max(0, Math.floor(at / size * count)));
      const row = cell(event.clientY - box.top, box.height, rows);
      choose(maps.strongest[row * columns + cell(event.clientX - box.left, box.width, columns)]);
    });
    if (token !== null) await choose(token);
  }

  // Ways

  function number(text, count) {
    return /^\d+$/.test(text || "") && Number(text) < count ? Number(text) : null;
  }

  async function render(event) {
    const hash = location.hash.slice(1), asked = new URLSearchParams(hash);
    const concept = number(asked.get("concept"), data.concepts.length);
    const image = number(asked.get("image"), data.names.length);
    const place = forward || event?.type !== "hashchange" ? null : places[location.hash];
    const moved = forward;
    forward = false;
    whenSeen.disconnect();
    view.replaceChildren();
    for (const entry of document.querySelectorAll("nav a")) {
      const current = entry.hash === location.hash;
      if (current) entry.setAttribute("aria-current", "page");
      else entry.removeAttribute("aria-current");
    }
    let ready = null;
    if (concept !== null) showConcept(concept);
    else if (image !== null) ready = showImage(image, number(asked.get("token"), data.parts));
    else if (hash === "images") showImages();
    else if (asked.get("find")) showFound(asked.get("find"));
    else if (!hash) showConcepts();
    else view.append(...heading("There is nothing here", `No “${hash}” in this atlas.`));
    document.title = `${view.querySelector("h2").textContent} · ${document.querySelector("h1").textContent}`;
    await ready;
    if (place) {
      const lists = view.querySelectorAll("ul.grid");
      place.counts.forEach((count, i) => lists[i]?.grow(count));
      scrollTo(0, place.y);
      const left = [...view.querySelectorAll("a")].find(a => a.getAttribute("href") === place.left);
      left?.focus({ preventScroll: true });
    } else if (moved) {
      const top = document.querySelector("nav").offsetTop;
      if (scrollY > top) scrollTo(0, top);
      view.querySelector("h2").focus({ preventScroll: true });
    }
  }

  function leave(href) {
    const counts = [...view.querySelectorAll("ul.grid")].map(e => e.children.length);
    places[location.hash] = { y: scrollY, counts, left: href };
    forward = true;
  }

  function go(hash) {
    leave(hash);
    location.hash = hash;
  }

  function up() {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (asked.has("image")) go("#images");
    else if (location.hash) go("#");
  }

  // The entry beside the one in focus, by where they are.
  function beside(entry, key) {
    const centre = e => { const b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; };
    const [x, y] = centre(entry);
    const along = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    let best = null, least = Infinity;
    for (const other of view.querySelectorAll("ul.grid a, ul.parts a")) {
      const [u, v] = centre(other), ahead = (u - x) * along[0] + (v - y) * along[1];
      const aside = Math.abs((u - x) * along[1]) + Math.abs((v - y) * along[0]);
      if (ahead > 4 && ahead + 3 * aside < least) [best, least] = [other, ahead + 3 * aside];
    }
    return best;
  }

  function key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const find = document.getElementById("find"), active = document.activeElement;
    if (active === find) {
      if (event.key === "Escape") { find.value = ""; find.blur(); up(); }
      return;
    }
    if (event.key === "/") { event.preventDefault(); find.focus(); find.select(); }
    if (event.key === "Escape") up();
    if (!event.key.startsWith("Arrow")) return;
    const entry = active.closest("ul.grid a, ul.parts a");
    const next = entry ? beside(entry, event.key)
      : event.key === "ArrowDown" ? view.querySelector("ul.grid a, ul.parts a")
      : view.querySelector({ ArrowLeft: "a[rel=prev]", ArrowRight: "a[rel=next]" }[event.key] || "none");
    if (!next) return;
    event.preventDefault();
    if (entry || event.key === "ArrowDown") next.focus();
    else next.click();
  }

  function start(values) {
    data = values;
    data.of_part = new Int16Array(bytes(data.of_part).buffer);
    data.masses = new Float32Array(bytes(data.masses).buffer);
    for (const entry of data.concepts) {
      entry.mean_map = Array.from(bytes(entry.mean_map), v => v / 255);
    }
    view = document.getElementById("view");
    document.getElementById("found").textContent = data.names.length < 2
      ? "with one image there are none." : `of the ${Math.min(data.codes.shown, data.names.length - 1)} ` +
      `images with the most similar parts by all numbers they find ${percent(data.codes.found)}.`;
    history.scrollRestoration = "manual";
    document.addEventListener("click", event => {
      const target = event.target.closest('a[href^="#"]');
      if (target && !event.defaultPrevented && target.hash !== location.hash) leave(target.getAttribute("href"));
    });
    document.addEventListener("keydown", key);
    document.getElementById("find").addEventListener("input", event => {
      const text = event.target.value.trim();
      // Letters are no steps of a way back.
      const step = location.hash.startsWith("#find=") ? "replaceState" : "pushState";
      history[step](null, "", text ? `#${new URLSearchParams({ find: text })}` : "#");
      render();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
    addEventListener("hashchange", render);
    render();
  }

  return { start, loaded };
})();
