// What the page does by itself: the language lists, what it keeps, keys, stopping, announcements,
// files, and whether the server is there. No library, nothing fetched from elsewhere.
// page.py writes `window.translator` before it: the languages, and the words in two languages.
(() => {
  const { languages, words } = window.translator;
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
  const names = new Map(
    languages.map(({ code, english, native }) => {
      const said = ["en", "ja", ...navigator.languages].map((tag) =>
        new Intl.DisplayNames([tag], { type: "language" }).of(code));
      return [code, [code, english, native, ...said].map(plain)];
    }),
  );
  const direction = (code) => languages.find((one) => one.code === code)?.direction ?? "auto";

  function named(name) {
    const asked = plain(name ?? "");
    const exact = languages.find((one) => names.get(one.code).includes(asked));
    if (exact || !asked) return exact?.code;
    const whole = (tag) => {
      try {
        return new Intl.Locale(tag).maximize();
      } catch {
        return {}; // not a tag
      }
    };
    const { language, script } = whole(asked.replace("_", "-"));
    return languages.find(({ code }) => {
      const one = whole(code);
      return language && one.language === language && one.script === script;
    })?.code;
  }

  // ---- language lists: gradio's own search only knows the names that it shows

  const codes = ["auto", ...languages.map((one) => one.code)];
  const boxOf = (event) => event.target.closest?.(".language input");
  const listOf = (box) => box.closest(".language").querySelector(".options ul");
  const shownIn = (list) => [...list.querySelectorAll("li:not([hidden])")];
  const codeOf = (box, item) =>
    codes[Number(item.dataset.index) + (box.closest("#source_language") ? 0 : 1)];

  function point(box, item) {
    for (const one of listOf(box).querySelectorAll(".at")) one.classList.remove("at");
    item?.classList.add("at");
    item?.scrollIntoView({ block: "nearest" });
    box.setAttribute("aria-activedescendant", item?.id ?? "");
  }

  function search(box) {
    const list = listOf(box);
    if (!list) return;
    const asked = plain(box.value);
    const rank = (item) => {
      const known = names.get(codeOf(box, item)) ?? [plain(item.textContent)];
      if (known[0] === asked) return 0;
      if (known.some((name) => name.startsWith(asked))) return 1;
      return known.slice(1).some((name) => name.includes(asked)) ? 2 : 3;
    };
    const items = [...list.querySelectorAll("li")];
    const ranks = new Map(items.map((item) => [item, rank(item)]));
    for (const item of items) item.hidden = ranks.get(item) === 3;
    list.dataset.none = items.every((item) => item.hidden) ? text.no_language : "";
    point(box, shownIn(list).sort((one, two) => ranks.get(one) - ranks.get(two))[0]);
  }

  function steer(event, box) {
    const list = listOf(box);
    if (!list || event.key === "Tab") return;
    event.stopImmediatePropagation(); // or gradio searches, too
    if (event.isComposing) return;
    const items = shownIn(list);
    const at = items.findIndex((item) => item.classList.contains("at"));
    const last = items.length - 1;
    const to = { ArrowDown: Math.min(at + 1, last), ArrowUp: Math.max(at - 1, 0), Home: 0, End: last };
    if (event.key in to) point(box, items[to[event.key]]);
    else if (event.key === "Enter") {
      items[at]?.dispatchEvent(new MouseEvent("mousedown", { bubbles: true, cancelable: true }));
    } else if (event.key === "Escape") box.blur();
    else return;
    event.preventDefault();
  }

  window.addEventListener("keydown", (event) => {
    const box = boxOf(event);
    if (box) steer(event, box);
  }, true);
  document.addEventListener("click", (event) => boxOf(event)?.select()); // what is typed replaces
  document.addEventListener("input", (event) => {
    const box = boxOf(event);
    if (box) search(box);
    if (event.target.closest?.("#source")) pages.count(event.target.value);
  });

  // ---- what is kept, in this browser alone

  const KEPT = "translator";
  const kept = { source: "", target: "", from: "auto", to: "en", heard: "" };
  let restored = false, saving;

  function save() {
    clearTimeout(saving);
    saving = undefined;
    try {
      if (restored) localStorage.setItem(KEPT, JSON.stringify(kept));
    } catch {
      // a private window, or no room: nothing is kept
    }
  }

  function before() {
    try {
      return JSON.parse(localStorage.getItem(KEPT)) ?? {};
    } catch {
      return {};
    }
  }

  /** Take the text and the languages out of the page's address; a reload asks for them no more. */
  function asked() {
    const address = new URL(location.href);
    const [written, from, to] = ["text", "from", "to"].map((name) => address.searchParams.get(name));
    const found = written === null ? {} : { source: written, target: "", from: "auto", heard: "" };
    if (from !== null) found.from = named(from) ?? "auto";
    if (named(to)) found.to = named(to);
    for (const name of ["text", "from", "to"]) address.searchParams.delete(name);
    if (String(address) !== location.href) history.replaceState(null, "", address);
    return found;
  }

  /** Say of both texts which language they are in, and which way it is written. */
  function dress() {
    const both = { source: kept.from === "auto" ? kept.heard : kept.from, target: kept.to };
    for (const [id, code] of Object.entries(both)) {
      const field = area(id);
      if (!field) continue;
      field.dir = direction(code);
      if (code) field.lang = code;
      else field.removeAttribute("lang");
    }
    const box = $("source_language");
    if (!box) return;
    const guess = kept.from === "auto" && kept.heard;
    const name = guess && new Intl.DisplayNames([locale], { type: "language" }).of(kept.heard);
    box.dataset.heard = guess ? text.detected.replace("{language}", name) : "";
    box.querySelector("input")?.setAttribute("aria-description", box.dataset.heard);
  }

  // ---- a press while a translation runs: stop it, and begin the new one

  const running = () => $("stop")?.disabled === false;
  let emptied = false;

  function press(id) {
    const button = $(id);
    if (button && !button.disabled) button.click();
  }

  document.addEventListener("click", (event) => {
    const id = event.target.closest?.("#go, #clear, .pill, #owners")?.id;
    if (id === "go" || id === "clear") {
      emptied = id === "clear" && running();
      press("stop");
    } else if (id !== undefined) {
      const open = $("backstage").classList.toggle("open", id ? undefined : true);
      $("owners").setAttribute("aria-expanded", open);
    }
  }, true);

  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return; // an input method's own Enter and Escape
    const id = event.key === "Escape" ? "stop" : event.key === "Enter" && (event.ctrlKey || event.metaKey) && "go";
    if (!id || $(id)?.disabled !== false) return;
    event.preventDefault();
    press(id);
  });

  // ---- what is read out: how a translation begins and how it ends, and nothing in between

  let told = "";
  function tell() {
    const status = document.querySelector("#status .status");
    const line = status?.querySelector("b").textContent ?? "";
    const now = status?.matches(".working, .waiting") ? "begun" : line;
    const guess = status?.dataset.source;
    if (guess && guess !== kept.heard) pages.keep("heard", guess);
    if (now === told || !$("spoken")) return;
    told = now;
    $("spoken").textContent = line;
  }

  // ---- is the server there? It tells when there is something new to show

  let start, seen;
  async function look() {
    let state;
    try {
      const options = { cache: "no-store", signal: AbortSignal.timeout(3000) };
      const answer = await fetch(new URL("state", document.baseURI), options);
      if (answer.ok) state = await answer.json();
    } catch {
      // not there: said below
    }
    lost(!state);
    if (!state) return;
    if (start !== undefined && state.start !== start) return location.reload(); // another app
    if (seen !== undefined && state.seen !== seen) press("refresh");
    ({ start, seen } = state);
    if (state.phase === "preparing") return setTimeout(look, 1000);
  }

  function lost(is) {
    const line = $("lost");
    if (!line || line.hidden === !is) return;
    line.textContent = is ? text.lost : "";
    line.hidden = !is;
    document.documentElement.classList.toggle("lost", is);
  }

  async function watch() {
    if (!document.hidden) await look();
    setTimeout(watch, 1500);
  }

  // ---- what page.py's events call

  window.pages = {
    press,
    swap(source, target, from, to) {
      const known = from === "auto" ? kept.heard : from;
      return [target || source, target ? source : "", to, known || (to === "en" ? "ja" : "en")];
    },
    restore() {
      const typed = area("source")?.value;
      Object.assign(kept, before(), typed ? { source: typed } : {}, asked());
      for (const name of ["from", "to"])
        if (!codes.slice(name === "to").includes(kept[name])) kept[name] = name === "to" ? "en" : "auto";
      restored = true;
      dress();
      return [kept.source, kept.target, kept.from, kept.to];
    },
    keep(name, value) {
      if (name === "source") pages.count(value);
      if (!restored) return;
      kept[name] = value ?? "";
      if (name === "from" || (name === "source" && !value)) kept.heard = "";
      if (name !== "source" || !value) dress();
      saving ??= setTimeout(save, 300);
    },
    link() {
      const address = new URL(location.href);
      const { source, from, to } = kept;
      for (const [name, value] of Object.entries({ text: source, from, to }))
        address.searchParams.set(name, value);
      return String(address);
    },
    over(target, status) {
      const shown = emptied ? ["", ""] : [target, status];
      emptied = false;
      return shown;
    },
    count(written) {
      const shown = $("count");
      if (!shown) return;
      const limit = Number(shown.dataset.limit);
      const count = [...(written || "")].length;
      shown.textContent = `${count.toLocaleString()} / ${limit.toLocaleString()}`;
      shown.classList.toggle("over", limit > 0 && count > limit);
    },
    async copy(copied, id) {
      const button = $(id);
      try {
        await navigator.clipboard.writeText(copied || "");
      } catch {
        // no clipboard without https or permission: select a copy the old way
        const field = document.createElement("textarea");
        field.value = copied || "";
        document.body.append(field);
        field.select();
        document.execCommand("copy");
        field.remove();
      }
      button?.classList.add("copied");
      setTimeout(() => button?.classList.remove("copied"), 1500);
    },
  };

  addEventListener("pagehide", save);
  // the keyboard of a phone lies on the page: the buttons go above it
  visualViewport?.addEventListener("resize", () => {
    const covered = Math.max(0, innerHeight - visualViewport.height - visualViewport.offsetTop);
    document.documentElement.style.setProperty("--keyboard", `${covered}px`);
  });

  /** Show the page once all of it is there: gradio adds part after part, and each moves the rest. */
  function settle() {
    const parts = ".pill, .language input, #source textarea, #target textarea";
    if (document.querySelectorAll(parts).length < 5) return;
    document.documentElement.classList.add("settled");
    area("source").focus({ preventScroll: true });
    const [swap, owners] = [$("swap"), $("owners")];
    swap.title = text.swap_title;
    swap.setAttribute("aria-label", text.swap_title);
    owners.setAttribute("aria-expanded", "false");
    owners.setAttribute("aria-controls", "backstage");
    dress();
    watch();
  }

  new MutationObserver(() => {
    for (const field of [area("target"), area("report")]) if (field) field.readOnly = true;
    if (!document.documentElement.matches(".settled")) settle();
    tell();
  }).observe(document, { childList: true, subtree: true, attributeFilter: ["class", "data-source"] });
})();
