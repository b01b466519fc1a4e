"""Operations of MiniMax-M3 over strided paged views: one file per operation, its torch reference beside it."""
