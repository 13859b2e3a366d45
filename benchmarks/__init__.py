"""kframe measured beside its peers, and against what grows. Linux only: figures come from ``/proc``.

`data`            the records, and what they must add up to
`measure`         one process and its children: seconds, CPU, memory
`peers`           one module per system, behind one small interface
`throughput`      every peer on the same topic, one after another
`latency`, `growth`, `backpressure`
`results`, `page` JSON files, and the plots and tables of docs/performance.md that are made from them
"""
