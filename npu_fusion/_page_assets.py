"""Style and script of the HTML report, which carries them inline: it is one file without a network."""

from __future__ import annotations

HUES = (212, 24, 152, 278, 338, 186, 92, 46)
"""One hue for each kind of fusion, told apart next to each other; more kinds start again at the first."""

CSS = """
:root{color-scheme:light dark;--bg:#fafaf8;--panel:#fff;--ink:#1c2027;--soft:#5d6673;--line:#e1e3e6;
--accent:#0b63ce;--warn:#a14a00;--warnbg:#fff4e5;--light:46%;--tint:.13;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
--mono:ui-monospace,"SF Mono","Cascadia Code",Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--panel:#1b1e24;--ink:#e4e7eb;--soft:#98a2b0;
--line:#2e333c;--accent:#6fb1ff;--warn:#ffb86b;--warnbg:#33240f;--light:64%;--tint:.2}}
*{box-sizing:border-box}
html{scroll-padding-top:5.5rem}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 var(--sans)}
header,main{max-width:1500px;margin:0 auto;padding:0 1.5rem}
header{padding-top:2rem}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .35rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;letter-spacing:-.01em;margin:2.4rem 0 .6rem}
p{margin:.3rem 0;max-width:80ch}
.soft,footer{color:var(--soft)}
footer{padding:2rem 0 3rem;font-size:.85rem}
code,.mono{font-family:var(--mono);font-size:.88em}
a{color:var(--accent);text-decoration-thickness:1px;text-underline-offset:2px}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:3px}
.badge{display:inline-block;padding:.05rem .55rem;border:1px solid var(--line);border-radius:99px;
font-size:.8rem;
color:var(--soft);background:var(--panel)}
.badge.warn{color:var(--warn);background:var(--warnbg);border-color:transparent}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;
margin:1.2rem 0 0;padding:0}
.tiles div{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:.7rem 1rem}
.tiles dt{color:var(--soft);font-size:.82rem}
.tiles dd{margin:0;font-size:1.5rem;font-weight:600;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.alert{background:var(--warnbg);color:var(--warn);border-radius:10px;padding:.7rem 1rem;margin-top:1rem}
.alert ul{margin:.2rem 0;padding-left:1.2rem}
.scroll{overflow-x:auto;background:var(--panel);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.5rem .9rem;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
th{font-weight:600}
th[scope=row]:has(.swatch){white-space:nowrap}
thead th{color:var(--soft);font-size:.82rem;white-space:nowrap}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.duo{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:0 1.5rem}
.where{list-style:none;margin:0;padding:0}
.where{display:flex;flex-wrap:wrap;gap:.35rem 1.1rem}
.where+details{margin-top:.35rem}
td summary{cursor:pointer;color:var(--soft);font-size:.85rem}
td details .where{max-height:20rem;overflow:auto}
.chip{display:inline-block;min-width:1.7em;text-align:center;padding:0 .35em;margin:1px;border-radius:5px;
font:600 .76rem/1.5 var(--mono);text-decoration:none;color:var(--ink);
background:hsl(var(--h,0) 75% 50%/var(--tint))}
a.chip:hover{background:hsl(var(--h,0) 75% 50%/.4)}
.chip.near{background:none;outline:1px dashed var(--warn);outline-offset:-1px;color:var(--warn)}
.swatch{display:inline-block;width:.75em;height:.75em;border-radius:3px;margin-right:.5em;
background:hsl(var(--h) 65% var(--light))}
.bar{display:block;height:.45rem;border-radius:3px;background:var(--accent);min-width:2px}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(30rem,100%),1fr));gap:1rem}
figure{margin:0;background:var(--panel);border:1px solid var(--line);border-radius:10px;
padding:.8rem 1rem;min-width:0}
figcaption{font-size:.88rem;margin-bottom:.5rem}
figure div{overflow:auto;max-height:46rem}
svg{display:block}
figure svg{margin:0 auto;max-width:100%;height:auto;min-width:min(100%,20rem)}
svg text{font:12px var(--mono);text-anchor:middle;fill:var(--ink)}
svg .edge{fill:none;stroke:var(--soft);stroke-width:1.2;opacity:.65}
svg rect.node{fill:hsl(var(--h) 75% 50%/var(--tint));stroke:hsl(var(--h) 60% var(--light)/.55)}
svg rect.fused{fill:hsl(var(--h) 65% 42%);stroke:none}
svg text.fused{fill:#fff;font-weight:600}
svg rect.strong{stroke:hsl(var(--h) 65% var(--light));stroke-width:2.2}
svg rect.input{fill:none;stroke:var(--line)}
svg text.input{fill:var(--soft);font-size:11px}
svg .become{fill:none;stroke:var(--soft);stroke-width:2;stroke-linecap:round;stroke-linejoin:round}
.tools{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;gap:.5rem .9rem;align-items:center;
background:var(--bg);padding:.6rem 0;border-bottom:1px solid var(--line)}
.tools input[type=search]{font:inherit;flex:1 1 14rem;min-width:0;max-width:26rem;padding:.35rem .7rem;
border:1px solid var(--line);border-radius:8px;background:var(--panel);color:inherit}
.tools button,.tools select{font:inherit;padding:.35rem .7rem;border:1px solid var(--line);border-radius:8px;
background:var(--panel);color:inherit;cursor:pointer}
.tools output{color:var(--soft);font-size:.85rem;font-variant-numeric:tabular-nums}
html:not(.js) .tools{display:none}
.map{width:100%;height:26px;margin:.9rem 0 .2rem;background:var(--panel);border:1px solid var(--line);
border-radius:6px}
.map a rect{fill:hsl(var(--h) 65% var(--light))}
.map a:hover rect,.map a:focus rect{opacity:.6}
.map .near{fill:var(--warn)}
.heads,.pair{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr)}
.heads{font-weight:600;font-size:.85rem;color:var(--soft)}
.heads span{padding:.4rem .8rem}
.code{background:var(--panel);border:1px solid var(--line);border-radius:10px;font:12.5px/1.5 var(--mono)}
.code ol{list-style:none;margin:0;padding:0;min-width:0}
.code .pair>ol+ol{border-left:1px solid var(--line)}
.code .diff{background:hsl(220 20% 50%/.05)}
.code li{padding:0 .8rem 0 2.4rem;text-indent:-1.6rem;overflow-wrap:anywhere;
border-left:3px solid transparent;
min-height:1.5em}
.code li[hidden]{display:none}
.code li b{font-weight:600}
.code li i{font-style:normal;color:var(--soft)}
.code li u{text-decoration:none;color:hsl(var(--h,212) 60% var(--light))}
.code li span{display:block}
.code li em{display:block;font-style:normal;color:var(--soft);opacity:.85;font-size:.92em}
.code li.f{background:hsl(var(--h) 75% 50%/var(--tint));border-left-color:hsl(var(--h) 65% var(--light))}
.code li.n{border-inline:1px dashed var(--warn)}
.code li.n.f{border-left:3px solid hsl(var(--h) 65% var(--light))}
.code li.n:first-child,.code li:not(.n)+li.n{border-top:1px dashed var(--warn)}
.code li.n:last-child,.code li.n:has(+li:not(.n)){border-bottom:1px dashed var(--warn)}
.code li.f:has(>.tag){border-top:1px solid hsl(var(--h) 65% var(--light)/.5)}
.code li.hover{background:hsl(var(--h,30) 75% 50%/.27)}
.code li.hit,.code li:has(:target){background:hsl(var(--h,30) 85% 50%/.36)}
.code li.del{background:hsl(0 75% 50%/.1)}
.code li.add{background:hsl(140 65% 40%/.13)}
.code li>.tag{float:right;text-indent:0;margin-left:.6rem;padding:0 .45em;border-radius:4px;
text-decoration:none;
font-size:.86em;color:#fff;background:hsl(var(--h) 60% 38%)}
.code li>.tag.near{color:var(--warn);background:var(--warnbg)}
.code details{border-block:1px solid var(--line)}
.code details+details{border-top:0}
.code summary,.stage>summary{cursor:pointer;padding:.25rem .8rem;color:var(--soft);
font:.85rem/1.6 var(--sans)}
.code summary:hover{color:var(--ink)}
.pair{content-visibility:auto;contain-intrinsic-size:auto calc(var(--n)*1.5em)}
.stage{margin-top:.6rem}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:.5rem;background:var(--panel);padding:.4rem .8rem;z-index:3}
@media (max-width:760px){header,main{padding:0 .9rem}header{padding-top:1.2rem}
.pair,.heads{grid-template-columns:minmax(0,1fr)}.heads span+span{display:none}
.pair.both>ol+ol{display:none}.code .pair>ol+ol{border-left:0;border-top:1px dashed var(--line)}
.tools{position:static}th,td{padding:.45rem .6rem}}
@media print{.tools,.map{display:none}.scroll,figure div{overflow:visible;max-height:none}}
"""

JS = """
(() => {
  'use strict';
  const root = document.documentElement, body = document.body, graph = document.getElementById('graph');
  root.classList.add('js');
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const lines = graph ? all('.code li', graph) : [], folds = graph ? all('details', graph) : [];
  const search = document.getElementById('search'), show = document.getElementById('show');
  const output = document.getElementById('found');
  const first = graph ? all('.tag[id^="r"]', graph) : [];
  let texts = null, at = -1;

  const group = (kind, value) => lines.filter(l => (l.dataset[kind] || '').split(' ').includes(value));
  const sets = name => lines.forEach(l => l.classList.remove(name));

  function reveal(line) {
    for (let d = line.closest('details'); d; d = d.parentElement.closest('details')) d.open = true;
  }
  function jump(id, scroll) {
    const tag = document.getElementById(id), target = tag && tag.closest('.code li');
    if (!target) return;
    if (target.hidden) { search.value = ''; show.value = 'all'; filter(); }
    sets('hit');
    const hits = group(id[0], id.slice(1));
    hits.forEach(l => { l.classList.add('hit'); reveal(l); });
    body.dataset.hit = id;
    body.dataset.hits = hits.length;
    at = first.indexOf(tag);
    if (scroll) target.scrollIntoView({block: 'center'});
  }
  function filter() {
    texts = texts || lines.map(l => l.textContent.toLowerCase());
    const wanted = search.value.trim().toLowerCase(), kind = show.value, active = !!wanted || kind !== 'all';
    let count = 0;
    lines.forEach((l, i) => {
      const r = 'r' in l.dataset, m = 'm' in l.dataset;
      const kept = kind === 'all' || (kind === 'marked' ? r || m : kind === 'fused' ? r : m);
      l.hidden = !(kept && texts[i].includes(wanted));
      count += !l.hidden;
    });
    folds.forEach(d => {
      const open = active && !!d.querySelector('li:not([hidden])');
      d.open = open;
      d.hidden = active && !open;
    });
    body.dataset.found = count;
    const told = [count, lines.length].map(n => n.toLocaleString('en')).join(' of ');
    output.textContent = active ? told + ' lines' : '';
  }
  function step(by) {
    if (!first.length) return;
    at = (at < 0 && by < 0 ? 0 : at) + by;
    at = (at + first.length) % first.length;
    history.replaceState(null, '', '#' + first[at].id);
    jump(first[at].id, true);
  }
  if (graph) {
    let timer = 0;
    search.addEventListener('input', () => { clearTimeout(timer); timer = setTimeout(filter, 120); });
    show.addEventListener('change', filter);
    document.getElementById('next').addEventListener('click', () => step(1));
    document.getElementById('previous').addEventListener('click', () => step(-1));
    let over = null;
    graph.addEventListener('mouseover', event => {
      const line = event.target.closest('.code li');
      if (line === over) return;
      over = line;
      sets('hover');
      if (!line) return;
      if ('r' in line.dataset) group('r', line.dataset.r).forEach(l => l.classList.add('hover'));
      if ('m' in line.dataset && !line.title) {
        const why = line.dataset.m.split(' ').map(n => document.getElementById('why' + n)).filter(Boolean);
        line.title = why.map(w => w.title).join('\\n');
      }
    });
    document.addEventListener('keydown', event => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === 'Escape' && event.target === search) { search.value = ''; filter(); search.blur(); }
      if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
      if (event.key === '/') { event.preventDefault(); search.focus(); }
      else if (event.key === 'n') step(1);
      else if (event.key === 'p') step(-1);
    });
    window.addEventListener('hashchange', () => jump(location.hash.slice(1), true));
    document.addEventListener('click', event => {
      const link = event.target.closest('a[href^="#"]');
      if (link && link.getAttribute('href') === location.hash) jump(location.hash.slice(1), true);
    });
  }
  body.dataset.lines = lines.length;
  body.dataset.marked = lines.filter(l => 'r' in l.dataset || 'm' in l.dataset).length;
  body.dataset.regions = first.length;
  const asked = new URLSearchParams(location.search);
  if (graph && (asked.has('search') || asked.has('show'))) {
    search.value = asked.get('search') || '';
    show.value = asked.get('show') || 'all';
    filter();
  }
  if (location.hash) jump(location.hash.slice(1), true);
  body.dataset.ready = 'yes';
})();
"""
