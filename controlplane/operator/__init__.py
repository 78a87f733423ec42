"""The operator: pods instead of processes, driven by custom resources."""
