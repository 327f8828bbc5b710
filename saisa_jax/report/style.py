"""How the page looks: from a wide screen to a phone, and on paper."""

CSS = """
:root { --ink: #1d1f23; --soft: #5c6066; --line: #e2e4e8; --tint: #f6f7f9; --right: #0072b2; --wrong: #c04a00;
  --paper: #fff; --notice: #fdf6e8; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 44px 28px 72px; }
h1 { font-size: 2.3rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 10px; }
h2 { font-size: 1.35rem; line-height: 1.25; letter-spacing: -0.01em; margin: 56px 0 8px; }
p { margin: 0 0 14px; max-width: 46rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
.note, figcaption, .small { color: var(--soft); font-size: 0.9rem; }
.notice { border-left: 4px solid #e69f00; background: var(--notice); padding: 10px 16px; margin: 14px 0;
  max-width: none; overflow-wrap: anywhere; }
.figures { display: grid; gap: 26px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  margin: 18px 0 0; align-items: start; }
figure { margin: 0; }
figure img, .plot { display: block; width: 100%; height: auto; }
.wide { margin-top: 26px; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 180px), 1fr)); gap: 1px;
  border: 1px solid var(--line); border-radius: 10px; overflow: hidden; margin: 28px 0 10px; }
.numbers div { box-shadow: 0 0 0 1px var(--line); padding: 18px 18px 16px; }
.numbers b { display: block; font-size: 1.85rem; line-height: 1.1; white-space: nowrap;
  letter-spacing: -0.02em; font-weight: 650; }
.numbers span { display: block; margin-top: 4px; font-weight: 600; font-size: 0.95rem; }
.numbers small { display: block; color: var(--soft); font-size: 0.84rem; line-height: 1.4; }
.scroll { overflow-x: auto; margin: 18px 0 10px; }
table { border-collapse: collapse; width: 100%; font-size: 0.94rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 9px 10px; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom; line-height: 1.3; }
thead th, tbody th { white-space: normal; }
tbody th { font-weight: 600; min-width: 9rem; }
td small { display: block; color: var(--soft); font-size: 0.8rem; }
.swatch { display: inline-block; width: 0.75em; height: 0.75em; border-radius: 2px; margin-right: 0.5em; }
.guess td, .guess th { color: var(--soft); font-weight: 400; }
.cards { display: grid; gap: 18px; grid-template-columns: repeat(auto-fill, minmax(min(46%, 215px), 1fr));
  margin: 18px 0 0; }
.card { border: 1px solid var(--line); border-radius: 10px; overflow: hidden; background: var(--paper); }
.card > img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--tint); }
.card > div { padding: 12px 14px 13px; }
.card .question { font-weight: 600; line-height: 1.3; margin: 0 0 8px; overflow-wrap: anywhere; }
.answer { display: flex; gap: 0.5em; align-items: baseline; line-height: 1.4; overflow-wrap: anywhere; }
.answer i { font-style: normal; color: var(--soft); font-size: 0.84rem; }
.right b { color: var(--right); } .wrong b { color: var(--wrong); }
.truth { color: var(--soft); font-size: 0.84rem; margin-top: 6px; }
.looked { margin-top: 28px; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(29%, 168px), 1fr));
  margin-top: 8px; }
.tiles img { border-radius: 6px; }
.tiles figcaption { line-height: 1.3; margin-top: 5px; font-size: 0.84rem; }
details { border: 1px solid var(--line); border-radius: 10px; padding: 12px 18px; margin-top: 14px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--tint); border-radius: 8px; padding: 14px 16px; font-size: 0.8rem;
  line-height: 1.5; }
footer { margin-top: 60px; border-top: 1px solid var(--line); padding-top: 14px; color: var(--soft);
  font-size: 0.85rem; }
@media (max-width: 640px) {
  body { font-size: 16px; }
  main { padding: 26px 16px 48px; }
  h1 { font-size: 1.75rem; }
  h2 { margin-top: 42px; }
  .wide .plot { width: 760px; max-width: none; }
  .numbers { grid-template-columns: 1fr 1fr; }
  .numbers div { padding: 14px; }
  .numbers b { font-size: 1.6rem; }
  .cards, .tiles { gap: 10px; }
  .card > div { padding: 9px 10px 10px; font-size: 0.9rem; }
}
@media print { main { max-width: none; } .card, figure { break-inside: avoid; } }
"""

DARK = """
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e8eaed; --soft: #a3a9b2; --line: #3a3e45; --tint: #24272c; --right: #58b4e8;
    --wrong: #ff9a5c; --paper: #16181b; --notice: #33291a; }
}
"""  # of pages without plots, whose paper is white
