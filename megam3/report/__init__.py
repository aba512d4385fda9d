"""What a run folder holds, as one HTML page: `record` reads, `chart` draws, `page` puts together."""
