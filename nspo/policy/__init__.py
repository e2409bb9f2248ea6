"""Training policies: on rollouts or on pairs of answers, with the null-space constraint as one callback."""
