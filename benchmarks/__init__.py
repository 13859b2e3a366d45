"""kframe measured beside its peers, and against what grows. Linux only: figures come from ``/proc``.

`data`            the records, and what they must add up to
`verify`          what a result adds up to, in DuckDB, in Parquet, in a topic
`marks`           what a measured program says
`measure`         one process and its children: seconds, CPU, memory
`peers`           one module per system, behind one small interface
`throughput`      every peer on the same topic, one after another
`latency`, `growth`, `backpressure`, `restart`
`results`         JSON files; `page` and `plots` make docs/performance.md from them
"""
