"""What tests, benchmarks and demos share."""
