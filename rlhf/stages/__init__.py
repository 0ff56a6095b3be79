"""A program a stage: `fetch`, `sft`, `reward`, `prepare`, `ppo`, `evaluate`. A stage never imports a stage."""
