"""What the store is made of: folders, locks, receipts, generations, and proofs of soundness."""
