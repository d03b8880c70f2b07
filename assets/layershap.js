// The page's own part: draws charts, links them with the layer strip, and keeps the address in step.
// Layers are known by their player number everywhere; only the strip holds what is dropped.
(() => {
  const CONFIG = { displayModeBar: false, responsive: false, scrollZoom: false };
  const charts = new Set();
  let strip = null;
  let pairs = null;
  let dropped = [];
  let marked = [];
  let loading = null;

  const library = () => {
    loading ??= new Promise((resolve, reject) => {
      // Gradio's base is where the page is anyway. With it, clip paths would name the address as it
      // was when a chart was made, and a chart whose address has changed would be clipped away.
      document.querySelector('base')?.removeAttribute('href');
      const script = document.createElement('script');
      const root = window.gradio_config?.root ?? '';
      script.src = `${root}/gradio_api/file=${LAYERSHAP.plotly}?v=${LAYERSHAP.version}`;
      script.onload = () => resolve(window.Plotly);
      script.onerror = () => { loading = null; reject(new Error('plotly.min.js did not load')); };
      document.head.append(script);
    });
    return loading;
  };

  // What a point of a figure stands for: {set}, {pair}, {player}, or nothing.
  const meaning = (figure, point) => {
    const link = figure.layout.meta ?? {};
    const own = point.data.meta ?? {};
    if (own.sets) return { set: own.sets[point.pointIndex] };
    if (own.rows) return { set: own.rows[point.pointIndex[0]] };
    if (own.pair) return { pair: own.pair };
    if (link.order) return { player: link.order[point.pointIndex] };
    if (link.x === 'player' && link.y === 'player') return { pair: [point.x, point.y] };
    if (link.x === 'player') return { player: point.x };
    return {};
  };

  const players = ({ set, pair, player }) => set ?? pair ?? (player === undefined ? [] : [player]);

  // Where a player stands on an axis, in pixels of the plot: [start, length].
  const band = (axis, place) => {
    const middle = axis._offset + axis.c2p(place);
    const length = Math.abs(axis.c2p(1) - axis.c2p(0));
    return [middle - length / 2, length];
  };

  const bands = (chart, numbers, kind) => {
    const { figure, plot } = chart;
    const link = figure.layout.meta ?? {};
    const { xaxis, yaxis } = plot._fullLayout;
    const made = [];
    const add = (left, top, width, height) => {
      const mark = document.createElement('div');
      mark.className = kind;
      Object.assign(mark.style, {
        left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px`,
      });
      made.push(mark);
    };
    for (const number of numbers) {
      if (link.x === 'player') {
        const [left, width] = band(xaxis, number);
        add(left, yaxis._offset, width, yaxis._length);
      }
      const row = link.order ? link.order.indexOf(number) : link.y === 'player' ? number : -1;
      if (row >= 0) {
        const [top, height] = band(yaxis, row);
        add(xaxis._offset, top, xaxis._length, height);
      }
    }
    return made;
  };

  const showMarks = (chart) => {
    if (!chart.plot._fullLayout || !chart.figure || chart.plot.hidden) return;
    chart.layer ??= Object.assign(document.createElement('div'), { className: 'ls-marks' });
    chart.layer.replaceChildren(
      ...(chart.figure.layout.meta?.shows_dropped === false ? [] : bands(chart, dropped, 'ls-gone')),
      ...bands(chart, marked, 'ls-here'),
    );
    if (chart.layer.parentNode !== chart.plot) chart.plot.append(chart.layer);
  };

  const mark = (numbers) => {
    if (numbers.length === marked.length && numbers.every((n, i) => n === marked[i])) return;
    marked = numbers;
    strip?.mark(marked);
    charts.forEach(showMarks);
  };

  const press = ({ set, pair, player }) => {
    if (set) strip?.choose(set);
    else if (pair) { if (pair[0] !== pair[1]) pairs?.(pair); }
    else if (player !== undefined) strip?.toggle(player);
  };

  // A square chart on a narrow screen needs no more height than width, and its colour bar's.
  const heightOf = ({ layout }, width) => (
    layout.yaxis?.scaleanchor ? Math.min(layout.height, width + layout.margin.t) : layout.height
  );

  const draw = async (chart) => {
    const { plot, figure } = chart;
    if (!figure || plot.hidden) return;
    const height = heightOf(figure, plot.clientWidth || Infinity);
    plot.style.minHeight = `${height}px`;
    // A chart in a hidden tab has no width yet; it is drawn when it is first seen.
    if (!plot.clientWidth) return;
    const turn = (chart.turn = (chart.turn ?? 0) + 1);
    const Plotly = await library();
    if (turn !== chart.turn) return;
    chart.width = plot.clientWidth;
    await Plotly.react(
      plot, figure.data, { ...figure.layout, autosize: false, width: chart.width, height }, CONFIG,
    );
    if (!chart.bound) {
      chart.bound = true;
      plot.on('plotly_click', (event) => press(meaning(chart.figure, event.points[0])));
      plot.on('plotly_hover', (event) => mark(players(meaning(chart.figure, event.points[0]))));
      plot.on('plotly_unhover', () => mark([]));
    }
    showMarks(chart);
  };

  // A picture of its own: on white, with what is dropped marked in it.
  const download = async ({ plot, figure, name }, format) => {
    const Plotly = await library();
    const link = figure.layout.meta ?? {};
    const shapes = dropped.flatMap((number) => {
      const gone = { type: 'rect', fillcolor: 'rgba(110,118,132,0.35)', line: { width: 0 } };
      const row = link.order ? link.order.indexOf(number) : link.y === 'player' ? number : -1;
      return [
        ...(link.x === 'player'
          ? [{ ...gone, yref: 'paper', y0: 0, y1: 1, x0: number - 0.5, x1: number + 0.5 }] : []),
        ...(row >= 0
          ? [{ ...gone, xref: 'paper', x0: 0, x1: 1, y0: row - 0.5, y1: row + 0.5 }] : []),
      ];
    });
    const layout = {
      ...figure.layout, paper_bgcolor: '#fff', plot_bgcolor: '#fff',
      font: { ...figure.layout.font, color: '#3b4252' },
      shapes: [...(figure.layout.shapes ?? []), ...shapes],
    };
    const size = { width: Math.max(plot.clientWidth, 480), height: figure.layout.height };
    await Plotly.downloadImage(
      { data: figure.data, layout }, { format, filename: name, scale: 2, ...size },
    );
  };

  const chart = (element, props, watch) => {
    const plot = element.querySelector('.ls-plot');
    const empty = element.querySelector('.ls-empty');
    const name = element.closest('[id]:not([id^="html-"])')?.id ?? 'chart';
    const self = { plot, figure: null, name };
    const update = () => {
      self.figure = props.value ? JSON.parse(props.value) : null;
      const message = self.figure ? self.figure.layout.meta?.empty : '';
      empty.textContent = message ?? '';
      plot.hidden = !self.figure || Boolean(message);
      element.classList.toggle('ls-nothing', plot.hidden);
      draw(self);
    };
    charts.add(self);
    new ResizeObserver(() => { if (plot.clientWidth !== self.width) draw(self); }).observe(plot);
    for (const button of element.querySelectorAll('.ls-download')) {
      button.addEventListener('click', () => download(self, button.dataset.format));
    }
    watch('value', update);
    update();
  };

  // The address restores what is on screen; on a Space it is the frame's parent that shows it.
  // Until the visitor does something it is still to be read.
  let acted = false;
  for (const act of ['pointerdown', 'keydown']) {
    window.addEventListener(act, () => { acted = true; }, { capture: true, once: true });
  }
  const remember = (changes) => {
    if (!acted) return;
    const address = new URL(window.location.href);
    for (const [name, value] of Object.entries(changes)) {
      if (value) address.searchParams.set(name, value);
      else address.searchParams.delete(name);
    }
    if (address.href === window.location.href) return;
    window.history.replaceState(window.history.state, '', address);
    if (window.parent !== window) {
      window.parent.postMessage({ queryString: address.search }, 'https://huggingface.co');
    }
  };

  const openTab = (name) => {
    const tabs = [...document.querySelectorAll('[role=tab]')];
    tabs.find((tab) => tab.textContent.trim() === name)?.click();
  };

  // The guide's steps lead to what they speak of.
  const GUIDE_HIDDEN = 'layershap-guide-hidden';
  const NO_GUIDE = 'ls-no-guide';
  const guide = (element) => {
    const go = [
      () => {
        const panel = document.querySelector('#set-up button');
        if (panel?.getAttribute('aria-expanded') !== 'true') panel?.click();
        panel?.focus();
      },
      () => document.querySelector('#analyse')?.focus(),
      () => {
        openTab('Prune and compare');
        document.querySelector('#layer-strip [tabindex="0"]')?.focus();
      },
    ];
    element.addEventListener('click', (event) => {
      const step = event.target.closest('[data-step]');
      if (step) go[Number(step.dataset.step)]();
      if (!event.target.closest('.ls-dismiss')) return;
      document.documentElement.classList.add(NO_GUIDE);
      window.localStorage.setItem(GUIDE_HIDDEN, 'yes');
    });
  };
  if (window.localStorage.getItem(GUIDE_HIDDEN)) document.documentElement.classList.add(NO_GUIDE);

  // The page is shown when what stands above the views is in its place.
  const ABOVE = ['#guide .ls-step', '#model-line .ls-model', '#set-up', '#stop', '#status *',
    '#layer-strip .ls-strip'];
  const showArranged = (frames = 600) => {
    const arranged = ABOVE.every((part) => document.querySelector(part));
    if (arranged) document.documentElement.classList.add('ls-arranged');
    else if (frames) requestAnimationFrame(() => showArranged(frames - 1));
  };
  showArranged();

  // The tab that the address names. A page that is still being put together forgets a press, so
  // it is pressed until it has stayed open for a while, or the visitor does something.
  const openNamedTab = (stayed = 0, tries = 400) => {
    const view = new URL(window.location.href).searchParams.get('view');
    if (!view || stayed > 20 || !tries || acted) return;
    const tab = document.querySelector(`[role=tab][data-tab-id="${CSS.escape(view)}"]`);
    const open = tab?.getAttribute('aria-selected') === 'true';
    if (!open) tab?.click();
    setTimeout(openNamedTab, 50, open ? stayed + 1 : 0, tries - 1);
  };
  openNamedTab();

  // A prediction of another selection than the one in the strip, until the server has answered.
  const greyOutdated = () => {
    const shown = document.querySelector('#predicted [data-dropped]');
    shown?.setAttribute('aria-busy', shown.dataset.dropped !== dropped.join());
  };

  window.LayerShap = {
    chart,
    guide,
    mark,
    remember,
    dropped: () => dropped,
    useStrip: (controls) => { strip = controls; },
    usePairs: (choose) => { pairs = choose; },
    useDropped: (numbers) => {
      dropped = [...numbers];
      charts.forEach(showMarks);
      greyOutdated();
    },
  };
})();
