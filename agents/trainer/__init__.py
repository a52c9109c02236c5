"""The trainer side: conversion tables, slots and the TrainerAgent."""
