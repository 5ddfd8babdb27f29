//! Stores the archives that have their own export names, in order and indexed by name.

use std::collections::HashMap;

use super::catalog::{AUXILIARY_SUFFIX, CatalogError, auxiliary_name};
use super::slot::SnapshotSlot;
use hexz_reader::StreamKind;

/// Archives in the order in which they were given.
#[derive(Debug, Default)]
pub(super) struct NamedSlots {
    slots: Vec<(String, SnapshotSlot)>,
    positions: HashMap<String, usize>,
}

impl NamedSlots {
    /// Adds an archive.
    ///
    /// # Errors
    /// One of its streams would have the same export name as a stream of another archive.
    pub(super) fn push(&mut self, name: String, slot: SnapshotSlot) -> Result<(), CatalogError> {
        // An archive's name may equal the name of another archive's auxiliary stream.
        if self.find(&name).is_some() {
            return Err(CatalogError::SameName(name));
        }
        let second = auxiliary_name(&name);
        if self.positions.contains_key(&second) {
            return Err(CatalogError::SameName(second));
        }
        self.positions.insert(name.clone(), self.slots.len());
        self.slots.push((name, slot));
        Ok(())
    }

    /// Returns the archive and stream that are served as the export of this name.
    pub(super) fn find(&self, export: &str) -> Option<(&str, &SnapshotSlot, StreamKind)> {
        let of = |name: &str, stream| {
            let (name, slot) = self.get(self.position(name)?)?;
            Some((name, slot, stream))
        };
        of(export, StreamKind::Main)
            .or_else(|| of(export.strip_suffix(AUXILIARY_SUFFIX)?, StreamKind::Auxiliary))
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.positions.contains_key(name)
    }

    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.positions.get(name).copied()
    }

    pub(super) fn get(&self, position: usize) -> Option<(&str, &SnapshotSlot)> {
        self.slots.get(position).map(|(name, slot)| (name.as_str(), slot))
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &SnapshotSlot)> {
        self.slots.iter().map(|(name, slot)| (name.as_str(), slot))
    }

    pub(super) fn slots_mut(&mut self) -> impl Iterator<Item = &mut SnapshotSlot> {
        self.slots.iter_mut().map(|(_, slot)| slot)
    }

    /// Returns the same archives, with none opened.
    pub(super) fn unopened(&self) -> Self {
        let again = |(name, slot): &(String, SnapshotSlot)| (name.clone(), slot.unopened());
        Self { slots: self.slots.iter().map(again).collect(), positions: self.positions.clone() }
    }
}
