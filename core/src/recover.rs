//! What a killed run left: finish it or undo it. Safe at any time, and twice.
