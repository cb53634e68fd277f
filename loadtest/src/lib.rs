pub mod device;
pub mod link;
