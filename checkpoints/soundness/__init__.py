"""Whether weights are what was saved: values, copies, replicas, checksums.

    odd_values.py   NaN, infinities and absurd values, named while they are read
    copies.py       files that are copies of another rank's or stage's
    replicas.py     tensors that all ranks should have alike
    stored_bits.py  tensors told apart by the bytes of their files, without torch
    check.py        all of it, over every byte: `inspect --check`

Rooms of formats and commands may import from here. This room imports `lazy`, `errors`, `parameters`
and `checkpoint`.
"""
