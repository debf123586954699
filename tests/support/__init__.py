"""What tests of several rooms share. Tests import from here, never from each other.

    configs  random_models  synthetic  dcp_folders  tiny_bert  huggingface_models  minilm_fixtures
    sentencepiece_models    small checkpoints of every era and family, and a tokenizer; every weight
                            is noise
    scripted_engine  toy_benchmark  result_records  real_race
                            an engine, a benchmark, records and passages that are known beforehand
    ranks  launch_targets  training_runs  training_target  command_line  command_line_fixtures
                            real ranks over gloo, and what they and the command line are made to run
    megatron_core_model  megatron_core_torch  megatron_core_fuzz
                            megatron-core in a process of its own, reading what we write, and
                            writing random models for us to read
    rounding  properties  live_tensors
                            how to compare: within rounding, on many examples, by bytes alive
    other_kernels  portable
                            the tests as other processors and numbers of threads would run them
    processes  house_rules  check_wheel  paths
                            which tests start processes, the rules of the house, the built wheel

Nothing here is a test.
"""
