"""The look of the report: light, dark and paper, from 400 pixels of width up."""

from __future__ import annotations

PART_COLORS = (
    "#2f6fb7",
    "#e08a1e",
    "#2a9d78",
    "#b4488f",
    "#d4b106",
    "#7461c9",
    "#77818c",
    "#b3bac2",
    "#3f4852",
)
"""Of the parts of memory, by their order in `fourbit.report.content.PARTS`; the last: others."""

_LIGHT = " ".join(f"--p{number}: {color};" for number, color in enumerate(PART_COLORS))

CSS = (
    f":root {{ {_LIGHT} }}"
    + "".join(
        f".curve.tone-{n} {{ stroke: var(--p{n}); }} .fill-{n} {{ fill: var(--p{n}); }} "
        for n in range(len(PART_COLORS))
    )
    + """
:root {
  --page: #ffffff; --panel: #f5f7f9; --ink: #1b2129; --soft: #57616d; --rule: #d5dbe2;
  --good: #17693a; --bad: #a6201b; --curve: #1f5fa8; --dot: #c2410c;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --panel: #1d2329; --ink: #e5e9ee; --soft: #a3adb8; --rule: #38424c;
    --good: #6fd394; --bad: #ff8f86; --curve: #6cb0f5; --dot: #ff9e64;
    --p0: #5b9be0; --p1: #f0a64b; --p2: #4fc29b; --p3: #d873b4; --p4: #e3c94a; --p5: #9d8cf0;
    --p6: #8b95a0; --p7: #5b646e; --p8: #c3cad2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 3rem; max-width: 84rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0; font-size: clamp(1.4rem, 1rem + 2vw, 2rem); line-height: 1.2; }
h1, td, dd, li, .verdict { overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule);
  font-size: 1.25rem; }
h3 { margin: 1.2rem 0 .4rem; font-size: 1rem; }
.maker { margin: 0 0 .2rem; color: var(--soft); font-size: .875rem; }
.verdict { margin: .8rem 0 0; padding: .6rem .9rem; border-left: .35rem solid; background:
  var(--panel); }
.good { color: var(--good); } .bad { color: var(--bad); }
.note { color: var(--soft); font-size: .875rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr));
  gap: .75rem; margin: 0; }
.figures div { padding: .7rem .9rem; border-radius: .4rem; background: var(--panel); }
.figures dt { color: var(--soft); font-size: .875rem; }
.figures dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures small { display: block; color: var(--soft); font-size: .8125rem; font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem 2.5rem;
  margin-bottom: 1rem; }
figure { margin: 0; break-inside: avoid; }
.wide { grid-column: 1 / -1; max-width: 58rem; }
figcaption { margin-bottom: .4rem; font-weight: 600; }
.picture { display: block; width: 100%; height: auto; overflow: visible; }
.picture text { fill: var(--soft); font-size: 14px; font-variant-numeric: tabular-nums; }
.wide .picture text { font-size: 12px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.curve { fill: none; stroke: var(--curve); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
.faint { stroke-width: 1; opacity: .4; }
.dots { stroke: var(--dot); stroke-width: 1.2; }
.dot { fill: var(--dot); }
.single { fill: var(--curve); }
.limit { stroke: var(--bad); stroke-dasharray: 7 5; stroke-linecap: butt; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0 0; padding: 0;
  list-style: none; color: var(--soft); font-size: .875rem; }
.key { width: 28px; height: 12px; margin-right: .4rem; }
.swatch { width: 12px; height: 12px; margin-right: .5rem; }
rect { stroke: var(--page); stroke-width: 1; }
.part-weights { fill: var(--p0); } .part-adapters { fill: var(--p1); }
.part-gradients { fill: var(--p2); } .part-optimizer { fill: var(--p3); }
.part-activations { fill: var(--p4); } .part-logits { fill: var(--p5); }
.part-workspace { fill: var(--p6); } .part-baseline { fill: var(--p7); }
.part-other, .part-measured { fill: var(--p8); }
table { width: 100%; border-collapse: collapse; font-size: .9375rem; }
caption { padding-bottom: .3rem; color: var(--soft); font-size: .875rem; text-align: left; }
th, td { padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; }
th { color: var(--soft); font-size: .8125rem; font-weight: 600; }
tr { break-inside: avoid; }
.facts td:first-child { width: 18rem; }
.numbers { max-width: 34rem; }
.numbers td, .figures dd { font-variant-numeric: tabular-nums; }
.numbers th + th, .numbers td + td { text-align: right; white-space: nowrap; }
.checks td:first-child { width: 5rem; font-weight: 600; }
.checks td:nth-child(2) { width: 16rem; }
.samples { table-layout: fixed; }
.compared td { font-variant-numeric: tabular-nums; }
.compared td:first-child { font-weight: 600; }
table + .charts { margin-top: 1.4rem; }
ul.verdict { padding-left: 1.9rem; }
.text { white-space: pre-wrap; }
.samples .text, code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas,
  "Liberation Mono", monospace; font-size: .84375rem; }
.match { margin: .3rem 0 0; font-size: .8125rem; }
.hidden { border: 1px solid var(--rule); border-radius: .2rem; color: var(--bad);
  font-size: .85em; }
summary { color: var(--soft); font-size: .875rem; cursor: pointer; }
details { margin-top: .3rem; }
@media (max-width: 44rem) {
  .charts { grid-template-columns: minmax(0, 1fr); }
  .picture text, .wide .picture text { font-size: 21px; }
  .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .figures dd { font-size: 1.05rem; }
  .samples, .samples tbody, .samples tr, .samples td, .checks, .checks tbody, .checks tr,
  .checks td, .compared, .compared tbody, .compared tr { display: block; width: auto; }
  .compared td { display: flex; justify-content: space-between; gap: 1rem; padding: .15rem 0;
    border: 0; }
  .compared td div { text-align: right; }
  .samples thead, .checks thead, .compared thead { position: absolute; width: 1px;
    height: 1px; overflow: hidden; clip-path: inset(50%); }
  .samples tr, .checks tr, .compared tr { padding: .6rem 0; border-bottom: 2px solid var(--rule); }
  .samples td, .checks td, .checks td:first-child, .checks td:nth-child(2) { width: auto;
    padding: .2rem 0; border: 0; }
  .samples td::before, .compared td::before { content: attr(data-label); color: var(--soft);
    font-size: .8125rem; font-weight: 600; }
  .samples caption, .checks caption, .compared caption { display: block; }
  .facts td:first-child { width: 45%; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  h2 { break-after: avoid; }
  details::details-content { display: block; content-visibility: visible; }
}
"""
)
