"""The questions: benchmarks turn data into requests or samples, and answers into figures.

    zero_shot/     WikiText-103, LAMBADA, given lines: scored, nothing is trained
    finetune/      RACE, MNLI, QQP, SQuAD: a BERT is trained for each
    language/      masked and causal language modelling on any text
    data/          where texts and data sets come from
    paper.py       the paper's tables (paper.toml) with measured figures in them
    comparison.py  any records side by side, and over training
    evaluation.py  any task by one call from Python
    records.py     result records, read back
    workloads.py   the work of each benchmark, for `mlm-eval plan`

A new benchmark goes into `zero_shot/` or `finetune/`; their doors say how. The tasks import all of
`mlm_eval` except the command line, and only the command line imports the tasks.
"""
