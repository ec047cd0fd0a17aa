"""What the command `onerec` runs: one module per step, from a log to a served model. Their YAML files are in
`configs/`.
"""
