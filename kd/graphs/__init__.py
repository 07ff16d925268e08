"""Networks on the nodes of a graph, and students of them that need no graph: see `docs/graphs.md`.

`graph` is the graph as a value and as a file, `networks` are GCN, GraphSAGE and a perceptron, and
`training` trains them on labels or from a teacher.
"""
