/* Makes tables sortable and filterable, keeps their state in the address, and draws the pictures. */
"use strict";

(() => {
  const root = document.documentElement;
  const token = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  /* The state of a page lies behind "#" as "key=value&key=value"; a plain "#name" is an anchor. */
  const state = {
    read() {
      const text = location.hash.slice(1);
      return new URLSearchParams(text.includes("=") ? text : "");
    },
    write(values) {
      const kept = Object.entries(values).filter(([, value]) => value);
      const text = new URLSearchParams(kept).toString();
      if (text || location.hash.includes("=")) {
        history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
      }
    },
  };

  /* Absent numbers stand last, whichever way a column is sorted. */
  function absentLast(direction) {
    return (one, other) => {
      if (one === "" || other === "") return (one === "") - (other === "");
      return direction * (Number(one) - Number(other));
    };
  }

  function leaderboard(table) {
    const { DataTable } = window;
    Object.assign(DataTable.ext.type.order, { "measure-asc": absentLast(1), "measure-desc": absentLast(-1) });
    const heads = [...table.tHead.rows[0].cells];
    const names = heads.map((head) => head.dataset.name);
    const grouped = "grouped" in table.dataset;
    const columns = heads.map((head, index) => ({
      name: head.dataset.name,
      orderable: head.dataset.name !== "against",
      visible: !(grouped && index === 0),
      ...(head.classList.contains("number")
        ? { type: "measure", orderSequence: "cost" in head.dataset ? ["asc", "desc"] : ["desc", "asc"] }
        : { orderSequence: ["asc", "desc"] }),
    }));
    const view = new DataTable(table, {
      columns,
      order: [],
      paging: false,
      autoWidth: false,
      layout: { topStart: null, topEnd: null, bottomStart: "info", bottomEnd: null },
      language: {
        entries: { _: "entries", 1: "entry" },
        info: "_TOTAL_ _ENTRIES-TOTAL_",
        infoEmpty: "No entries",
        infoFiltered: "of _MAX_",
        zeroRecords: "No entry passes all filters.",
      },
      ...(grouped && {
        orderFixed: { pre: [[0, "asc"]] },
        rowGroup: { dataSrc: (row) => row[0].display ?? row[0], startRender: heading },
      }),
    });

    /* DataTables would announce the fixed order of the comparisons. */
    view.on("draw", () => {
      const [index, direction] = view.order().filter(([column]) => !(grouped && column === 0)).at(-1) ?? [];
      heads.forEach((head, column) => {
        const sorted = column === index && { asc: "ascending", desc: "descending" }[direction];
        if (sorted) head.setAttribute("aria-sort", sorted);
        else head.removeAttribute("aria-sort");
      });
    });

    /* Above the rows of a comparison stands its name, a link. */
    function heading(rows) {
      const cell = document.createElement("th");
      cell.scope = "rowgroup";
      cell.colSpan = rows.columns(":visible").count();
      const line = document.createElement("div");
      line.className = "group";
      const name = rows.cell(rows.indexes()[0], 0).node();
      line.append(...[...name.childNodes].map((node) => node.cloneNode(true)));
      cell.append(line);
      const row = document.createElement("tr");
      row.append(cell);
      return row;
    }
    return { view, names, heads };
  }

  function filtered(board, form) {
    const { view, names, heads } = board;
    const controls = [...form.elements].filter((control) => control.name && control.type !== "radio");
    const shown = () => form.elements.view.value;
    const standard = shown();
    const valid = (control, value) =>
      control.tagName !== "SELECT" || [...control.options].some((option) => option.value === value);

    view.search.fixed("filters", (_text, _data, index) => {
      const row = view.row(index).node();
      return controls.every((control) => {
        const wanted = control.value.trim().toLowerCase();
        if (!wanted) return true;
        return control.name === "find"
          ? `${row.querySelector("th").textContent} ${row.dataset.paper ?? ""}`.toLowerCase().includes(wanted)
          : row.dataset[control.name].toLowerCase() === wanted;
      });
    });

    function order() {
      const sorted = view.order().filter(([index]) => index > 0)[0];
      return sorted && sorted[1] ? `${names[sorted[0]]}.${sorted[1]}` : "";
    }

    function apply() {
      heads.forEach((head, index) => {
        if (head.dataset.views) view.column(index).visible(head.dataset.views.split(" ").includes(shown()), false);
      });
      view.columns.adjust().draw();
      remember();
    }

    function remember() {
      const values = Object.fromEntries(controls.map((control) => [control.name, control.value.trim()]));
      state.write({ ...values, view: shown() === standard ? "" : shown(), order: order() });
    }

    function recall() {
      const wanted = state.read();
      for (const control of controls) {
        const value = wanted.get(control.name) ?? "";
        control.value = valid(control, value) ? value : "";
      }
      const views = [...form.elements.view].filter((radio) => !radio.disabled).map((radio) => radio.value);
      form.elements.view.value = views.includes(wanted.get("view")) ? wanted.get("view") : standard;
      const [, name, direction] = /^(.*)\.(asc|desc)$/.exec(wanted.get("order") ?? "") ?? [];
      const index = names.indexOf(name);
      view.order(index > 0 ? [[index, direction]] : []);
      apply();
      unfold();
    }

    /* On a narrow screen unused filters are folded away; on a wide one there is nothing to unfold them with. */
    const narrow = window.matchMedia("(max-width: 40rem)");
    function unfold() {
      const more = form.querySelector("details");
      more.open = !narrow.matches || [...more.querySelectorAll("select")].some((select) => select.value);
    }
    narrow.addEventListener("change", unfold);

    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const event of ["input", "change"]) form.addEventListener(event, apply);
    form.addEventListener("reset", () => setTimeout(() => { view.order([]); apply(); }));
    view.on("order", remember);
    window.addEventListener("hashchange", () => { if (!location.hash.slice(1) || location.hash.includes("=")) recall(); });
    recall();
  }

  function config() {
    const font = token("--sans");
    const ink = "var(--ink)";
    const muted = "var(--muted)";
    const words = { labelFont: font, titleFont: font, labelColor: muted, titleColor: muted, labelFontSize: 11 };
    return {
      background: "transparent",
      font,
      view: { stroke: null },
      axis: {
        ...words, titleFontSize: 11, titleFontWeight: "normal", titlePadding: 8,
        domainColor: "var(--rule)", tickColor: "var(--rule)", gridColor: "var(--grid)", labelPadding: 4, tickSize: 4,
      },
      axisX: { grid: false },
      axisY: { domain: false, ticks: false },
      legend: { ...words, labelColor: ink, labelFontSize: 12, offset: 6, rowPadding: 4, columnPadding: 14 },
      header: { ...words, labelColor: ink, labelFontSize: 12, labelAnchor: "start", labelPadding: 4 },
      text: { font, fontSize: 11, color: muted },
    };
  }

  /* Panels side by side, as many as the page is wide. */
  function panels(spec, width) {
    if (!spec.facet) return spec;
    const columns = Math.max(1, Math.floor(width / spec.usermeta.panel));
    const single = Math.floor((width - 30) / columns) - 28;
    return { ...spec, columns, spec: { ...spec.spec, width: single }, spacing: { row: 18, column: 20 } };
  }

  async function draw(chart) {
    const spec = JSON.parse(chart.querySelector("script").textContent);
    const target = document.createElement("div");
    target.className = "drawing";
    target.setAttribute("aria-hidden", "true");
    chart.append(target);
    const options = {
      actions: false, renderer: "svg", defaultStyle: false, config: config(),
      tooltip: { disableDefaultStyle: true },
    };
    let width = 0;
    let shown = null;
    async function fit() {
      const now = Math.floor(target.clientWidth);
      if (!now || now === width) return;
      width = now;
      shown?.finalize();
      shown = await window.vegaEmbed(target, panels(spec, now), options);
    }
    await fit();
    if (spec.facet) new ResizeObserver(() => requestAnimationFrame(fit)).observe(chart);
    chart.dataset.drawn = "";
  }

  /* Runs and pairs lie compressed in scripts, a few in each: a page that was opened as a file may load nothing else. */
  function shelved(address) {
    return new Promise((resolve) => {
      const script = document.createElement("script");
      let found;
      window.shelve = (content) => { found = content; };
      script.onload = script.onerror = () => resolve(found);
      script.src = address;
      document.head.append(script);
    });
  }

  async function unfolded(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  /* The content of a page that shows one of many, or a sentence where there is no such one. */
  function fill(place, content, absent) {
    place.innerHTML = content ?? absent;
    place.removeAttribute("aria-busy");
    if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  }

  /* The page of a run shows the one whose id stands behind "?". */
  async function run(place) {
    const id = location.search.slice(1);
    const runs = /^[0-9a-f]{12}$/.test(id) ? await shelved(`runs/${id.slice(0, 2)}.js`) : undefined;
    const content = runs?.[id] && await unfolded(runs[id]);
    fill(place, content, "<h1>No such run</h1><p>The leaderboard's seeds lead to the runs that there are.</p>");
    document.title = document.title.replace("A run", place.querySelector("h1").textContent);
  }

  /* The page of two rows shows those whose ids stand behind "?" and the comparison's name; of one row, and the best of
     the others. The row that stands higher comes first, whichever was named first. */
  async function versus(place, form) {
    const [name, ...asked] = location.search.slice(1).split("&");
    const known = /^[a-z0-9][a-z0-9.-]*$/.test(name) ? await shelved(`versus/${name}/rows.js`) : undefined;
    if (known === undefined) {
      fill(place, undefined, "<h1>No such comparison</h1><p>Those that there are stand on the leaderboard.</p>");
      return;
    }
    const ids = known.rows.map(([id]) => id);
    const chosen = [asked[0] ?? ids[0], asked[1] ?? ids.find((id) => id !== (asked[0] ?? ids[0]))];
    const [first, second] = [...chosen].sort((one, other) => ids.indexOf(one) - ids.indexOf(other));
    const pairs = chosen.every((id) => ids.includes(id)) ? await shelved(`versus/${name}/${first}.js`) : undefined;
    const content = pairs && JSON.parse(await unfolded(pairs))[second];
    fill(place, content, first === second && ids.includes(first)
      ? "<h1>One row twice</h1><p>There is nothing to pair: choose two different rows.</p>"
      : "<h1>No such rows</h1><p>The comparison does not have both: choose two of those that it has.</p>");
    document.title = document.title.replace("Two rows", place.querySelector("h1").textContent.replace(/\s+/g, " "));
    form.dataset.address = `versus.html?${name}`;
    for (const [index, select] of form.querySelectorAll("select").entries()) {
      select.replaceChildren(...known.rows.map(([id, label]) => new Option(label, id, false, id === chosen[index])));
    }
    choose(form);
    place.querySelector("h1").after(form);
  }

  /* Two rows are chosen by name, and shown when asked for. */
  function choose(form) {
    form.hidden = false;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const ids = [...form.querySelectorAll("select")].map((select) => select.value);
      location.href = [form.dataset.address, ...ids].join("&");
    });
  }

  document.addEventListener("DOMContentLoaded", async () => {
    const place = document.querySelector("#run, #versus");
    const choice = document.getElementById("choice");
    if (place?.id === "run") await run(place);
    else if (place) await versus(place, choice);
    else if (choice) choose(choice);
    if (window.DataTable) {
      for (const table of document.querySelectorAll("table.ranking")) {
        const board = leaderboard(table);
        const form = document.getElementById("filters");
        if (form) filtered(board, form);
      }
    }
    if (window.vegaEmbed) document.querySelectorAll(".chart").forEach(draw);
    root.dataset.ready = "";
  });
})();
