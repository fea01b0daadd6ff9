"""How long a pruned model will take: operators measured at many sizes, on this machine or on another."""
