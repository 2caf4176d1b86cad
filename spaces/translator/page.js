// What the page does by itself: the language lists, what it keeps, stopping, announcements, files,
// and whether the server is there. No library, nothing fetched from elsewhere. page.py writes
// `window.translator` before it: the languages, and the words in each language of the interface.
(() => {
  const { languages, words, kinds, limit } = window.translator;
  const wanted = navigator.languages.map((tag) => tag.split("-")[0]);
  const locale = wanted.find((tag) => tag in words) ?? "en";
  const text = words[locale];
  const $ = (id) => document.getElementById(id);
  const area = (id) => document.querySelector(`#${id} textarea`);
  document.documentElement.lang = locale;
  // gradio chooses the language of its own words by this, the server by Accept-Language
  Object.defineProperty(navigator, "language", { get: () => locale });

  // ---- languages: by code, tag or name, with or without accents
  const plain = (name) => name.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase().trim();
  const inWords = (code, tag) => new Intl.DisplayNames([tag], { type: "language" }).of(code);
  const codes = ["auto", ...languages.map((one) => one.code)];
  const names = new Map(languages.map(({ code, english, native, japanese, also }) => {
    const local = navigator.languages.map((tag) => inWords(code, tag));
    return [code, [code, english, native, japanese, ...also.split(" "), ...local].map(plain)];
  }));
  const direction = (code) => languages.find((one) => one.code === code)?.direction ?? "auto";

  /** The code of the language that a link means, undefined for none of ours. */
  function named(name) {
    const asked = plain(name).replace("_", "-");
    const exact = codes.find((code) => code === asked || names.get(code)?.includes(asked));
    if (exact || !/^[a-z]{2,3}(-[a-z0-9]+)*$/.test(asked)) return exact;
    const [one, ...others] = [asked, ...codes.slice(1)].map((tag) => new Intl.Locale(tag).maximize());
    const at = others.findIndex((other) => other.language === one.language && other.script === one.script);
    return codes[at + 1] === "auto" ? undefined : codes[at + 1];
  }

  // ---- language lists: gradio's own search only knows the names that it shows
  const boxOf = (event) => event.target.closest?.(".language input");
  const listOf = (box) => box.closest(".language").querySelector(".options ul");
  const codeOf = (box, item) =>
    codes[Number(item.dataset.index) + (box.closest("#source_language") ? 0 : 1)];

  function point(box, item) {
    listOf(box).querySelector(".at")?.classList.remove("at");
    item?.classList.add("at");
    item?.scrollIntoView({ block: "nearest" });
    box.setAttribute("aria-activedescendant", item?.id ?? "");
  }

  function search(box) {
    const list = listOf(box);
    if (!list) return;
    const asked = plain(box.value);
    const rank = (item) => {
      const [code, ...known] = names.get(codeOf(box, item)) ?? ["auto", plain(item.textContent)];
      if (code === asked) return 0;
      if ([code, ...known].some((name) => name.startsWith(asked))) return 1;
      return known.some((name) => name.includes(asked)) ? 2 : 3;
    };
    const ranked = [...list.querySelectorAll("li")].map((item) => [rank(item), item]);
    for (const [rank, item] of ranked) item.hidden = rank === 3;
    const [best] = ranked.filter(([rank]) => rank < 3).sort(([one], [two]) => one - two);
    list.dataset.none = best ? "" : text.no_language;
    point(box, best?.[1]);
  }

  window.addEventListener("keydown", (event) => {
    const box = boxOf(event);
    if (!box || !listOf(box) || event.key === "Tab") return;
    event.stopImmediatePropagation(); // or gradio searches, too
    if (event.isComposing) return;
    const items = [...listOf(box).querySelectorAll("li:not([hidden])")];
    const [at, last] = [items.findIndex((item) => item.matches(".at")), items.length - 1];
    const to = { ArrowDown: Math.min(at + 1, last), ArrowUp: Math.max(at - 1, 0), Home: 0, End: last };
    if (event.key in to) point(box, items[to[event.key]]);
    else if (event.key === "Escape") box.blur();
    else if (event.key === "Enter")
      items[at]?.dispatchEvent(new MouseEvent("mousedown", { bubbles: true, cancelable: true }));
    else return;
    event.preventDefault();
  }, true);

  document.addEventListener("click", (event) => boxOf(event)?.select()); // what is typed replaces
  document.addEventListener("input", (event) => boxOf(event) && search(boxOf(event)));

  // ---- what is kept, in this browser alone
  const KEPT = "translator";
  const kept = { source: "", target: "", from: "auto", to: "en", chosen: "", heard: "" };
  let restored = false, saving;
  function save() {
    saving = clearTimeout(saving);
    try {
      if (restored) localStorage.setItem(KEPT, JSON.stringify(kept));
    } catch {
      // a private window, or no room: nothing is kept
    }
  }

  /** Take text and languages out of the page's address: a reload asks for them no more. */
  function linked() {
    const address = new URL(location.href);
    const [written, from, to] = ["text", "from", "to"].map((name) => address.searchParams.get(name));
    for (const name of ["text", "from", "to"]) address.searchParams.delete(name);
    if (String(address) !== location.href) history.replaceState(null, "", address);
    return {
      ...(written !== null && { source: written, target: "", heard: "", from: "auto" }),
      ...(from && { from: named(from) ?? "auto" }),
      ...(to && codes.slice(1).includes(named(to)) && { to: named(to), chosen: "yes" }),
    };
  }

  /** Say of both texts which language they are in, and which way it is written. */
  function dress() {
    const guess = kept.from === "auto" ? kept.heard : "";
    for (const [id, code] of [["source", guess || kept.from], ["target", kept.to]]) {
      const field = area(id);
      if (!field) return;
      field.dir = direction(code);
      field.lang = code === "auto" ? locale : code;
    }
    const box = $("source_language");
    box.dataset.heard = guess && text.detected.replace("{language}", inWords(guess, locale));
    box.querySelector("input").setAttribute("aria-description", box.dataset.heard);
  }

  // ---- presses: one while a translation runs stops it; what is cleared then stays empty
  let emptied = false;
  const press = (id) => $(id)?.disabled === false && $(id).click();

  document.addEventListener("click", (event) => {
    const id = event.target.closest?.("#go, #clear, #owners, #open_file")?.id;
    if (id === "open_file") choose();
    if (id === "clear") emptied = $("stop").disabled === false;
    if (id === "clear" || id === "go") press("stop");
    if (id !== "owners" && !event.target.closest?.(".pill")) return;
    const open = $("backstage").classList.toggle("open", id ? undefined : true);
    $("owners").setAttribute("aria-expanded", open);
  }, true);

  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return; // an input method's own Enter and Escape
    const sent = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if ((sent || event.key === "Escape") && press(sent ? "go" : "stop") !== false) event.preventDefault();
  });

  // ---- what is read out: how a translation begins and how it ends, and nothing in between
  let told = "";
  function tell() {
    const status = document.querySelector("#status .status");
    const line = status?.querySelector("b").textContent ?? "";
    const guess = status?.dataset.source;
    if (guess && guess !== kept.heard) pages.keep("heard", guess);
    const now = status?.matches(".working, .waiting") ? "begun" : line;
    if (now === told) return;
    told = now;
    $("spoken").textContent = line;
  }

  // ---- is the server there? It tells when there is something new to show
  let start, seen;
  async function look() {
    setTimeout(look, 1500);
    if (document.hidden) return;
    const options = { cache: "no-store", signal: AbortSignal.timeout(2500) };
    const state = await fetch(new URL("state", document.baseURI), options)
      .then((answer) => (answer.ok ? answer.json() : null)).catch(() => null);
    if ($("lost").hidden === !state) $("lost").textContent = state ? "" : text.lost;
    $("lost").hidden = Boolean(state);
    document.documentElement.classList.toggle("lost", !state);
    if (!state) return;
    if (start && state.start !== start) return location.reload(); // another app: it knows us not
    if (start && state.seen !== seen) press("refresh");
    ({ start, seen } = state);
  }

  // ---- files: read here, translated by the server, given back as a download
  const refused = (sentence) => ["", "", `<div class="status failed"><b>${sentence}</b></div>`];
  let held;
  function hold(file) {
    held = file;
    press("file_held");
  }

  const give = (download, href) => Object.assign(document.createElement("a"), { href, download }).click();

  function choose() {
    const input = Object.assign(document.createElement("input"), { type: "file", accept: kinds.join() });
    input.onchange = () => hold(input.files[0]);
    input.click();
  }

  // ---- what page.py's events call
  window.pages = {
    press,
    swap(source, target, from, to) {
      const known = (from === "auto" ? kept.heard : from) || (to === "en" ? "ja" : "en");
      return [target || source, target ? source : "", to, known];
    },
    restore() {
      const typed = area("source")?.value;
      let last = {};
      try {
        last = JSON.parse(localStorage.getItem(KEPT)) ?? {};
      } catch {
        // no storage, or what is in it is none of ours
      }
      for (const name of Object.keys(kept)) if (typeof last[name] === "string") kept[name] = last[name];
      Object.assign(kept, typed && { source: typed }, linked());
      if (!codes.includes(kept.from)) kept.from = "auto";
      if (!codes.slice(1).includes(kept.to)) kept.to = "en";
      restored = true;
      dress();
      return [kept.source, kept.target, kept.from, kept.to, kept.chosen];
    },
    keep(name, value) {
      if (name === "source") pages.count(value);
      if (!restored) return;
      kept[name] = value ?? "";
      if (name === "from" || (name === "source" && !value)) kept.heard = "";
      if (name !== "target") dress();
      saving ??= setTimeout(save, 300);
    },
    link() {
      const search = new URLSearchParams({ text: kept.source, from: kept.from, to: kept.to });
      return String(Object.assign(new URL(location.href), { search }));
    },
    over(...shown) {
      const result = emptied ? ["", ""] : shown;
      emptied = false;
      return result;
    },
    count(written) {
      const shown = $("count");
      const [count, most] = [[...(written || "")].length, Number(shown.dataset.limit)];
      shown.textContent = `${count.toLocaleString()} / ${most.toLocaleString()}`;
      shown.classList.toggle("over", most > 0 && count > most);
    },
    async copy(copied, id) {
      try {
        await navigator.clipboard.writeText(copied || "");
      } catch {
        // no clipboard without https or permission: select a copy the old way
        const field = Object.assign(document.createElement("textarea"), { value: copied || "" });
        document.body.append(field);
        field.select();
        document.execCommand("copy");
        field.remove();
      }
      $(id).classList.add("copied");
      setTimeout(() => $(id).classList.remove("copied"), 1500);
    },
    /** Read the file: its name, its content in base64, and a sentence where it is refused. */
    async file() {
      if (held.size > limit) return refused(text.file_too_large);
      if (!held.size) return refused(text.file_no_words);
      const reader = new FileReader();
      reader.readAsDataURL(held);
      await new Promise((done) => { reader.onloadend = done; });
      if (reader.error) return refused(text.file_not_read);
      return [held.name, reader.result.split(",")[1], ""];
    },
    save: (written) => give("translation.txt", `data:text/plain;charset=utf-8,${encodeURIComponent(written)}`),
    /** Save what the server made: `{name, content}` in JSON, the content in base64. */
    saveFile(made) {
      const { name, content } = JSON.parse(made || "{}");
      if (name) give(name, `data:application/octet-stream;base64,${content}`);
    },
  };

  addEventListener("pagehide", save);
  for (const kind of ["dragover", "dragleave", "drop"])
    document.addEventListener(kind, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault(); // or the browser leaves the page for the file
      $("left").classList.toggle("over", kind === "dragover");
      if (kind === "drop") hold(event.dataTransfer.files[0]);
    });
  // the keyboard of a phone lies on the page: the buttons go above it
  visualViewport.addEventListener("resize", () => {
    const covered = Math.max(0, innerHeight - visualViewport.height - visualViewport.offsetTop);
    document.documentElement.style.setProperty("--keyboard", `${covered}px`);
  });

  /** Show the page once all of it is there: gradio adds part after part, and each moves the rest. */
  function settle() {
    const parts = ".pill, .language input, #source textarea, #target textarea";
    if (document.querySelectorAll(parts).length < 5) return;
    document.documentElement.classList.add("settled");
    area("source").focus({ preventScroll: true });
    for (const name of ["title", "aria-label"]) $("swap").setAttribute(name, text.swap_title);
    $("owners").setAttribute("aria-expanded", "false");
    dress();
    look();
  }

  new MutationObserver(() => {
    for (const field of [area("target"), area("report")]) if (field) field.readOnly = true;
    if (document.documentElement.matches(".settled")) tell();
    else settle();
  }).observe(document, { childList: true, subtree: true, attributeFilter: ["class", "data-source"] });
})();
