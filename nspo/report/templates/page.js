"use strict";
// Fills the browser of answers from the JSON on the page. All text is set as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("browser-data").textContent);
  const root = document.getElementById("browser");
  const PAGE = 12;
  const WORDS = 1e6; // most pairs of words that are compared to mark what changed
  let most = PAGE;

  const make = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const distinct = (values) => [...new Set(values)].filter((value) => value !== "").sort();

  // Each answer is [text, notes, unsafe, refused, correct]; the base model's comes first, then those of the shown ones.
  const verdicts = {
    "any": () => true,
    "unsafe": (base, others) => [base, ...others].some((a) => a[2]),
    "unsafe before, safe after": (base, others) => base[2] && others.some((a) => a[2] === false),
    "safe before, unsafe after": (base, others) => base[2] === false && others.some((a) => a[2]),
    "answered before, refused after": (base, others) => !base[3] && others.some((a) => a[3]),
    "refused": (base, others) => [base, ...others].some((a) => a[3]),
    "correct before, wrong after": (base, others) => base[4] && others.some((a) => a[4] === false),
    "wrong before, correct after": (base, others) => base[4] === false && others.some((a) => a[4]),
    "changed": (base, others) => others.some((a) => a[0] !== 0),
    "same in all": (base, others) => others.every((a) => a[0] === 0),
  };

  const choice = (name, values) => {
    const select = make("select", { id: `browser-${name}` }, ...values.map((value) => make("option", { value, textContent: value })));
    select.addEventListener("change", () => { most = PAGE; draw(); });
    return select;
  };
  const set = choice("set", ["any", ...distinct(data.cases.map((c) => c.set))]);
  const category = choice("category", ["any", ...distinct(data.cases.map((c) => c.category))]);
  const verdict = choice("verdict", Object.keys(verdicts));
  const search = make("input", { type: "search", id: "browser-search", placeholder: "in prompts and answers" });
  search.addEventListener("input", () => { most = PAGE; draw(); });
  const boxes = data.models.map((model, index) => {
    const box = make("input", { type: "checkbox", checked: data.start.includes(index) });
    box.addEventListener("change", draw);
    return box;
  });

  const swatch = (model) => {
    const dot = make("span", { className: "swatch" });
    dot.style.setProperty("--colour", model.colour);
    return dot;
  };
  const models = make("fieldset", {}, make("legend", { textContent: "Models" }), ...data.models.map((model, index) => make("label", {}, boxes[index], make("span", {}, swatch(model), model.label))));
  const count = make("p", { className: "note", id: "browser-count" });
  count.setAttribute("aria-live", "polite");
  const list = make("div", { id: "browser-list" });
  const more = make("button", { type: "button", textContent: "Show more" });
  more.addEventListener("click", () => { most += PAGE; draw(); });
  const labelled = (text, control) => make("label", {}, text, control);
  root.append(
    make("div", { className: "controls" }, labelled("Set", set), labelled("Category", category), labelled("Verdict", verdict), labelled("Search", search)),
    models, count, list, more,
  );

  // The words of `text` in parts, those that `before` has in the same order apart from the others (longest common run).
  const parts = (before, text) => {
    const [old, now] = [before, text].map((one) => one.split(/(\s+)/));
    if (old.length * now.length > WORDS) return [[text, false]];
    const row = () => new Uint16Array(now.length + 1);
    const best = [row()];
    for (let i = old.length - 1; i >= 0; i -= 1) {
      best.unshift(row());
      for (let j = now.length - 1; j >= 0; j -= 1) best[0][j] = old[i] === now[j] ? best[1][j + 1] + 1 : Math.max(best[1][j], best[0][j + 1]);
    }
    const found = [];
    const say = (word, changed) => (found.length && found.at(-1)[1] === changed ? (found.at(-1)[0] += word) : found.push([word, changed]));
    let i = 0;
    for (let j = 0; j < now.length; j += 1) {
      while (i < old.length && old[i] !== now[j] && best[i + 1][j] >= best[i][j + 1]) i += 1;
      const kept = i < old.length && old[i] === now[j];
      say(now[j], !kept);
      if (kept) i += 1;
    }
    return found;
  };

  const answer = (found, place) => {
    const [text, notes] = found.answers[place];
    const same = text === 0;
    const shown = same ? "the same answer as the base model's" : text || "(empty answer)";
    const box = make("div", { className: "answer" }, make("h4", { textContent: data.models[place].label }), make("p", { className: "notes", textContent: notes || "answered" }), make("p", { className: same ? "text equal" : "text" }, ...(place && !same ? parts(found.answers[0][0], shown) : [[shown, false]]).map(([words, changed]) => (changed ? make("mark", { textContent: words }) : words))));
    box.style.setProperty("--colour", data.models[place].colour);
    return box;
  };

  const card = (found, places) => {
    const said = [`${found.role} prompt, ${found.set}`, found.category, found.id].filter(Boolean).join(" · ");
    const body = [make("p", { className: "prompt", textContent: found.prompt }), make("div", { className: "answers" }, ...places.map((place) => answer(found, place)))];
    if (found.role !== "harmful") return make("div", { className: "case" }, make("p", { className: "kind", textContent: said }), ...body);
    const outcome = places.map((place) => `${data.models[place].label}: ${found.answers[place][1] || "answered"}`).join("; ");
    return make("details", { className: "case" }, make("summary", {}, make("span", { className: "kind", textContent: said }), make("span", { className: "outcome", textContent: outcome })), ...body);
  };

  function draw() {
    const places = boxes.flatMap((box, index) => (box.checked ? [index] : []));
    const words = search.value.trim().toLowerCase();
    const fits = (found) => {
      const others = places.filter((place) => place > 0).map((place) => found.answers[place]);
      const texts = [found.prompt, ...places.map((place) => found.answers[place][0] || "")];
      return (set.value === "any" || found.set === set.value)
        && (category.value === "any" || found.category === category.value)
        && verdicts[verdict.value](found.answers[0], others)
        && (!words || texts.some((text) => text.toLowerCase().includes(words)));
    };
    const found = data.cases.filter(fits);
    const harmful = found.slice(0, most).some((c) => c.role === "harmful");
    count.textContent = `${found.length} of ${data.cases.length} prompts` + (harmful ? ". Harmful prompts and their answers are folded: click one to read it." : ".");
    list.replaceChildren(...found.slice(0, most).map((one) => card(one, places)));
    more.hidden = found.length <= most;
  }
  draw();

  // What is wider than the screen can be reached, and scrolled, with the keyboard.
  const reach = () => document.querySelectorAll(".scroll, pre").forEach((box) => {
    const wide = box.scrollWidth > box.clientWidth;
    if (!wide) return ["tabindex", "role", "aria-label"].forEach((name) => box.removeAttribute(name));
    for (const [name, value] of [["tabindex", "0"], ["role", "group"], ["aria-label", "Scrolls sideways"]]) box.setAttribute(name, value);
  });
  addEventListener("resize", reach);
  document.addEventListener("toggle", reach, true);
  reach();
})();
